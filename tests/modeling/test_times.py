"""Times: quantiles of what training draws, and grids that solvers step through."""

import pytest
import torch

from modeling.times import EstimatePath, TimeDistribution, move_logit

double = {"dtype": torch.float64}


@pytest.mark.parametrize(
    "times", [TimeDistribution(), TimeDistribution(mean=0.4, std=0.7, shift=3.0), TimeDistribution(kind="uniform")]
)
def test_quantiles_rise_from_data_to_noise(times: TimeDistribution) -> None:
    time_T = times.quantile(torch.linspace(0, 1, 1001))
    assert time_T.dtype == torch.float64
    assert (time_T[0], time_T[-1]) == (0, 1)
    assert (time_T.diff() > 0).all()


def test_quantiles_are_those_of_the_logit_normal() -> None:
    drawn_T = torch.sigmoid(0.3 + 1.5 * torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    found = TimeDistribution(mean=0.3, std=1.5).quantile(shares).float()
    torch.testing.assert_close(found, drawn_T.quantile(shares), rtol=0, atol=3e-3)


def test_without_mean_and_shift_the_times_are_symmetric() -> None:
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)
    time_T = TimeDistribution().quantile(shares)
    torch.testing.assert_close(time_T, 1 - time_T.flip(0), rtol=0, atol=1e-12)


def test_shift_moves_towards_noise() -> None:
    shares = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    plain_T, shifted_T = TimeDistribution().quantile(shares), TimeDistribution(shift=3.0).quantile(shares)
    torch.testing.assert_close(shifted_T, 3 * plain_T / (1 + 2 * plain_T))
    assert (shifted_T > plain_T).all()
    # In the logit, a shift is a translation by log(shift): it equals a mean.
    torch.testing.assert_close(
        shifted_T, TimeDistribution(mean=float(torch.tensor(3.0).double().log())).quantile(shares)
    )


def test_the_grid_falls_through_the_quantiles() -> None:
    grid = TimeDistribution().grid(50)
    assert len(grid) == 51
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()
    assert grid[25] == pytest.approx(0.5)


def test_the_grid_of_windows_is_as_wide_as_the_times_of_their_tokens() -> None:
    """logit(t) of tokens is N(mean, std^2 + spread^2); what windows draw in training is not changed by it."""
    spread, wide = TimeDistribution(mean=0.8, std=0.9, spread=1.2), TimeDistribution(mean=0.8, std=1.5)
    torch.testing.assert_close(spread.grid(20), wide.grid(20), rtol=0, atol=1e-12)
    shares = torch.linspace(0, 1, 9)
    assert torch.equal(spread.quantile(shares), TimeDistribution(mean=0.8, std=0.9).quantile(shares))


@pytest.mark.parametrize("wrong", [{"kind": "beta"}, {"std": 0.0}, {"shift": -1.0}, {"spread": -0.1}])
def test_unknown_distributions_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"unknown|must be positive"):
        TimeDistribution(**wrong)


def test_moving_the_logit_scales_the_signal_to_noise_ratio() -> None:
    uniform = torch.rand(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = TimeDistribution(mean=1.0, std=1.0).quantile(uniform)
    offset = torch.randn(4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = move_logit(time, offset)
    ratio = ((1 - moved) / moved) / ((1 - time) / time)
    torch.testing.assert_close(ratio, (-offset).exp())
    assert move_logit(torch.tensor([0.0, 1.0]), torch.tensor([3.0, -3.0])).tolist() == [0.0, 1.0]


def test_the_even_grid_steps_between_equal_changes_of_the_estimate() -> None:
    """An estimate that moves along (1 - t)^2: its even times are 1 - sqrt(share), as far as it was followed."""
    path = EstimatePath()
    for t in torch.linspace(1, 0.0, 4001, **double).tolist():
        path.add(t, torch.full((5, 3), (1 - t) ** 2, **double))
    times = TimeDistribution(path=path.even_times())
    expected = 1 - torch.linspace(0, 1, 17, **double).sqrt()
    torch.testing.assert_close(times.grid(16, "even"), expected, rtol=0, atol=1e-6)
    # Between the measured times, which here are finer by two, it is linear.
    middle = times.grid(64, "even")
    torch.testing.assert_close(middle[1::2], (middle[:-1:2] + middle[2::2]) / 2)
    with pytest.raises(ValueError, match='"even" needs the times measured on the trained model'):
        TimeDistribution().grid(16, "even")
    assert EstimatePath().even_times() == ()


def test_the_uniform_grid_falls_in_equal_steps_whatever_the_training_times() -> None:
    grid = TimeDistribution(std=0.3, shift=4.0).grid(10, "uniform")
    torch.testing.assert_close(grid, torch.linspace(1, 0, 11, **double))
    with pytest.raises(ValueError, match="time grid 'cosine' is unknown; expected one of training, even, uniform"):
        TimeDistribution().grid(10, "cosine")
