"""The flow's equations: inverses of each other, and floors that are the losses of the predictors they name."""

import pytest
import torch

from modeling import flow
from modeling.flow import blind_floor, covariance_floor


def draw(seed: int = 0, num: int = 500) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise and times in float64."""
    generator = torch.Generator().manual_seed(seed)
    data_TZ, noise_TZ = torch.randn(2, num, 3, generator=generator, dtype=torch.float64)
    time_T1 = 0.02 + 0.98 * torch.rand(num, 1, generator=generator, dtype=torch.float64)
    return data_TZ, noise_TZ, time_T1


def test_time_runs_from_data_to_noise() -> None:
    data_TZ, noise_TZ, time_T1 = draw()
    assert torch.equal(flow.interpolate(data_TZ, noise_TZ, torch.zeros_like(time_T1)), data_TZ)
    assert torch.equal(flow.interpolate(data_TZ, noise_TZ, torch.ones_like(time_T1)), noise_TZ)


def test_the_velocity_is_the_paths_slope() -> None:
    data_TZ, noise_TZ, time_T1 = draw()
    step = 1e-3
    ahead_TZ = flow.interpolate(data_TZ, noise_TZ, time_T1 + step)
    behind_TZ = flow.interpolate(data_TZ, noise_TZ, time_T1 - step)
    torch.testing.assert_close((ahead_TZ - behind_TZ) / (2 * step), flow.velocity(data_TZ, noise_TZ))


def test_round_trips_are_exact() -> None:
    data_TZ, noise_TZ, time_T1 = draw()
    noisy_TZ, velocity_TZ = flow.interpolate(data_TZ, noise_TZ, time_T1), flow.velocity(data_TZ, noise_TZ)
    exact = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(flow.data_from_velocity(noisy_TZ, velocity_TZ, time_T1), data_TZ, **exact)
    torch.testing.assert_close(noisy_TZ + (1 - time_T1) * velocity_TZ, noise_TZ, **exact)


def test_the_blind_floor_has_its_known_figures() -> None:
    time_T = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    expected = 2 - (2 * time_T - 1) ** 2 / (time_T**2 + (1 - time_T) ** 2)
    torch.testing.assert_close(blind_floor(time_T), expected)
    quarters = blind_floor(time_T).view(4, -1).mean(-1)
    assert quarters.tolist() == pytest.approx([1.287, 1.855, 1.855, 1.287], abs=1e-3)


def test_the_best_linear_predictor_reaches_the_blind_floor() -> None:
    data_TZ, noise_TZ, _ = draw(num=300_000)
    for time in (0.1, 0.5, 0.8):
        t = torch.tensor(time, dtype=torch.float64)
        # The best linear map: Cov(v*, z_t) / Var(z_t) = (2t - 1) / (t^2 + (1-t)^2).
        guess_TZ = (2 * t - 1) / (t**2 + (1 - t) ** 2) * flow.interpolate(data_TZ, noise_TZ, t)
        loss = (guess_TZ - flow.velocity(data_TZ, noise_TZ)).square().mean()
        assert float(loss) == pytest.approx(float(blind_floor(t)), rel=5e-3)


def test_unit_eigenvalues_know_no_more_than_blind() -> None:
    time_T = torch.linspace(0, 1, 21, dtype=torch.float64)
    torch.testing.assert_close(covariance_floor(time_T, torch.ones(7, dtype=torch.float64)), blind_floor(time_T))
    spread = torch.tensor([0.1, 0.4, 2.5], dtype=torch.float64)
    assert (covariance_floor(time_T, spread) <= blind_floor(time_T) + 1e-12).all()


@pytest.mark.parametrize("time", [0.125, 0.5, 0.875])
def test_the_covariance_floor_is_the_optimal_predictors_loss_on_gaussian_data(time: float) -> None:
    generator = torch.Generator().manual_seed(1)
    root_ZZ = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    covariance_ZZ = root_ZZ @ root_ZZ.T
    covariance_ZZ *= 4 / covariance_ZZ.trace()
    data_TZ = torch.randn(200_000, 4, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(covariance_ZZ).T
    noise_TZ = torch.randn(data_TZ.shape, generator=generator, dtype=torch.float64)
    noisy_TZ = flow.interpolate(data_TZ, noise_TZ, torch.tensor(time))
    # E[z | z_t] of jointly Gaussian variables: Cov(z, z_t) Cov(z_t)^-1 z_t.
    identity_ZZ = torch.eye(4, dtype=torch.float64)
    gain_ZZ = (1 - time) * covariance_ZZ @ torch.linalg.inv((1 - time) ** 2 * covariance_ZZ + time**2 * identity_ZZ)
    guess_TZ = (noisy_TZ - noisy_TZ @ gain_ZZ.T) / time
    loss = (guess_TZ - flow.velocity(data_TZ, noise_TZ)).square().mean()
    expected = covariance_floor(torch.tensor(time, dtype=torch.float64), torch.linalg.eigvalsh(covariance_ZZ))
    assert float(loss) == pytest.approx(float(expected), rel=5e-3)
