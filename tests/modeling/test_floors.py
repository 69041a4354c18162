"""The unigram floor's denoiser is exact Bayes, and the floors are in the order of what they know."""

import math

import pytest
import torch

from modeling import flow
from modeling.floors import Floors, TokenMixture, measure_floors


def mixture(num_components: int, latent_dim: int, seed: int = 0) -> TokenMixture:
    """Random weights, means and variances."""
    generator = torch.Generator().manual_seed(seed)
    weights_C = torch.rand(num_components, generator=generator, dtype=torch.float64) + 0.1
    means_CZ = torch.randn(num_components, latent_dim, generator=generator, dtype=torch.float64)
    variances_CZ = 0.02 + 0.3 * torch.rand(num_components, latent_dim, generator=generator, dtype=torch.float64)
    return TokenMixture((weights_C / weights_C.sum()).log(), means_CZ, variances_CZ)


def sample(of: TokenMixture, num: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(latents, components)."""
    generator = torch.Generator().manual_seed(seed)
    tokens_M = torch.multinomial(of.log_weights_C.exp(), num, replacement=True, generator=generator)
    noise_MZ = torch.randn(num, of.means_CZ.shape[1], generator=generator, dtype=torch.float64)
    return of.means_CZ[tokens_M] + of.variances_CZ[tokens_M].sqrt() * noise_MZ, tokens_M


@pytest.mark.parametrize("time", [0.05, 0.3, 0.7, 0.95])
def test_the_denoiser_is_the_posterior_mean_by_brute_force(time: float) -> None:
    of, noisy_M = mixture(5, 1), torch.linspace(-3, 3, 41, dtype=torch.float64)
    z_G = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    spread_C1 = of.variances_CZ.sqrt()
    prior_G = (of.log_weights_C[:, None] - 0.5 * ((z_G - of.means_CZ) / spread_C1) ** 2 - spread_C1.log()).exp().sum(0)
    likelihood_MG = (-0.5 * ((noisy_M[:, None] - (1 - time) * z_G) / time) ** 2).exp()
    joint_MG = likelihood_MG * prior_G
    expected_M = (joint_MG * z_G).sum(-1) / joint_MG.sum(-1)
    torch.testing.assert_close(of.denoise(noisy_M[:, None], time)[:, 0], expected_M, rtol=1e-6, atol=1e-6)


def test_one_component_is_the_gaussian_closed_form() -> None:
    of, noisy_MZ, time = mixture(1, 3), torch.randn(7, 3, dtype=torch.float64), 0.4
    gain_CZ = (1 - time) * of.variances_CZ / ((1 - time) ** 2 * of.variances_CZ + time**2)
    expected_MZ = of.means_CZ + gain_CZ * (noisy_MZ - (1 - time) * of.means_CZ)
    torch.testing.assert_close(of.denoise(noisy_MZ, time), expected_MZ)


def test_fitting_finds_the_mixture_and_shares_out_the_rare() -> None:
    of = mixture(3, 2)
    latents_MZ, tokens_M = sample(of, 200_000)
    found = TokenMixture.fit(latents_MZ, tokens_M)
    order_C = of.log_weights_C.argsort(descending=True)  # most frequent first
    torch.testing.assert_close(found.log_weights_C, of.log_weights_C[order_C], rtol=0, atol=0.02)
    torch.testing.assert_close(found.means_CZ, of.means_CZ[order_C], rtol=0, atol=0.01)
    torch.testing.assert_close(found.variances_CZ, of.variances_CZ[order_C], rtol=0, atol=0.01)

    rare = TokenMixture.fit(latents_MZ, tokens_M, max_components=1)
    assert len(rare.log_weights_C) == 2
    torch.testing.assert_close(rare.means_CZ[1], latents_MZ[tokens_M != order_C[0]].mean(0))
    few = TokenMixture.fit(latents_MZ[:4], torch.tensor([7, 7, 8, 9]), min_count=5)
    torch.testing.assert_close(few.means_CZ, latents_MZ[:4].mean(0, keepdim=True))
    assert few.log_weights_C.tolist() == [0.0]


def standardised(of: TokenMixture, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples with zero mean and unit variance per channel, as the flow sees them."""
    latents_MZ, tokens_M = sample(of, num)
    return (latents_MZ - latents_MZ.mean(0)) / latents_MZ.std(0), tokens_M


def test_who_knows_more_has_the_lower_floor() -> None:
    latents_MZ, tokens_M = standardised(mixture(12, 3), 60_000)
    floors = measure_floors(latents_MZ, tokens_M, num_samples=15_000)
    assert (floors.covariance_G <= floors.blind_G + 1e-9).all()
    noise = 0.03 * floors.blind_G  # of the estimate from 15,000 samples
    assert (floors.unigram_G <= floors.covariance_G + noise).all()
    assert (floors.unigram_G < 0.9 * floors.covariance_G).sum() > 5  # and by much where tokens tell latents apart
    torch.testing.assert_close(floors.blind_G, flow.blind_floor(floors.times_G))


def test_tokens_that_say_nothing_leave_the_gaussian_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    latents_MZ = torch.randn(80_000, 2, generator=generator, dtype=torch.float64)
    floors = measure_floors(latents_MZ, torch.zeros(80_000, dtype=torch.int64), num_samples=20_000)
    torch.testing.assert_close(floors.unigram_G, floors.blind_G, rtol=0.04, atol=0)
    torch.testing.assert_close(floors.covariance_G, floors.blind_G, rtol=0.01, atol=0)
    assert floors.within_token_variance == pytest.approx(1.0, abs=0.01)


def test_the_unigram_floor_is_the_loss_of_its_denoiser() -> None:
    of = mixture(4, 2)
    latents_MZ, tokens_M = standardised(of, 40_000)
    floors = measure_floors(latents_MZ, tokens_M, num_samples=10_000, seed=3)
    fitted = TokenMixture.fit(latents_MZ[:-10_000], tokens_M[:-10_000])
    clean_MZ, time = latents_MZ[-10_000:], float(floors.times_G[11])
    noise_MZ = torch.randn(clean_MZ.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    noisy_MZ = flow.interpolate(clean_MZ, noise_MZ, torch.tensor(time))
    guess_MZ = flow.velocity_from_data(noisy_MZ, fitted.denoise(noisy_MZ, time), torch.tensor(time))
    loss = (guess_MZ - flow.velocity(clean_MZ, noise_MZ)).square().mean()
    assert float(loss) == pytest.approx(float(floors.unigram_G[11]), rel=0.05)


def test_the_strict_floor_sees_correlations_within_tokens_that_the_other_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_M = torch.randint(0, 3, (60_000,), generator=generator)
    means_VZ = torch.tensor([[-3.0, 0.0], [0.0, 3.0], [3.0, -3.0]], dtype=torch.float64)
    # One direction within a token, shared by both channels: diagonal Gaussians see two independent ones.
    along_M = torch.randn(60_000, 1, generator=generator, dtype=torch.float64)
    across_M = 0.1 * torch.randn(60_000, 1, generator=generator, dtype=torch.float64)
    latents_MZ = means_VZ[tokens_M] + along_M + across_M * torch.tensor([1.0, -1.0])
    floors = measure_floors(latents_MZ, tokens_M, num_samples=15_000)
    early = (floors.times_G > 0.15) & (
        floors.times_G < 0.35
    )  # noise between the two directions' deviations, 0.14 and 1.4
    assert (floors.strict_unigram_G[early] < 0.8 * floors.unigram_G[early]).all()
    assert (floors.strict_unigram_G <= 1.01 * floors.unigram_G).all()


def test_within_token_variance_is_the_share_that_tokens_leave_open() -> None:
    of = TokenMixture(
        torch.tensor([0.5, 0.5], dtype=torch.float64).log(),
        torch.tensor([[-1.0], [1.0]], dtype=torch.float64),
        torch.full((2, 1), 0.25, dtype=torch.float64),
    )
    latents_MZ, tokens_M = sample(of, 40_000)
    assert measure_floors(latents_MZ, tokens_M, 100).within_token_variance == pytest.approx(0.25 / 1.25, rel=0.03)


def test_floors_between_grid_points_are_interpolated() -> None:
    times_G = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    floors = Floors(times_G, times_G, 2 * times_G, 10 - times_G, 5 - times_G, 1.0)
    found = floors.at(torch.tensor([0.0, 0.1, 0.3, 0.9, 1.0]))
    assert found["blind"].tolist() == pytest.approx([0.1, 0.1, 0.3, 0.9, 0.9])
    assert found["covariance"].tolist() == pytest.approx([0.2, 0.2, 0.6, 1.8, 1.8])
    assert found["unigram"].tolist() == pytest.approx([9.9, 9.9, 9.7, 9.1, 9.1])
    assert found["strict_unigram"].tolist() == pytest.approx([4.9, 4.9, 4.7, 4.1, 4.1])
    assert math.isclose(float(floors.at(torch.tensor([0.5]))["blind"]), 0.5, rel_tol=1e-6)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 target tokens, found 3"):
        measure_floors(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
