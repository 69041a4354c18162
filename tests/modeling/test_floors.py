"""Floors know what they say, and no more."""

import pytest
import torch

from modeling import flow
from modeling.floors import Floors, measure_floors


def test_channels_that_correlate_have_the_floor_of_their_eigenvalues() -> None:
    generator = torch.Generator().manual_seed(0)
    root_ZZ = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    latents_MZ = torch.randn(100_000, 3, generator=generator, dtype=torch.float64) @ root_ZZ.T
    floors = measure_floors(latents_MZ, torch.zeros(100_000, dtype=torch.int64))
    expected_Z = torch.tensor([0.2, 1.0, 1.8], dtype=torch.float64)
    torch.testing.assert_close(floors.eigenvalues_Z, expected_Z, rtol=0.02, atol=0.01)
    time_T = torch.linspace(0.05, 0.95, 19)
    found = floors.at(time_T)
    torch.testing.assert_close(found["blind"], flow.blind_floor(time_T))
    torch.testing.assert_close(
        found["covariance"], flow.covariance_floor(time_T, expected_Z.float()), rtol=0.02, atol=0.01
    )
    assert (found["covariance"] < found["blind"]).all()


def test_channels_that_do_not_leave_the_blind_floor() -> None:
    latents_MZ = torch.randn(80_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure_floors(latents_MZ, torch.zeros(80_000, dtype=torch.int64)).at(torch.linspace(0, 1, 11))
    torch.testing.assert_close(found["covariance"], found["blind"], rtol=0.01, atol=0)


def test_within_token_variance_is_the_share_that_tokens_leave_open() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_M = torch.randint(0, 2, (40_000,), generator=generator)
    latents_MZ = (2.0 * tokens_M - 1)[:, None] + 0.5 * torch.randn(40_000, 1, generator=generator)
    assert measure_floors(latents_MZ, tokens_M).within_token_variance == pytest.approx(0.25 / 1.25, rel=0.03)


def test_they_follow_the_times_precision() -> None:
    floors = Floors(torch.ones(3, dtype=torch.float64), 0.1)
    assert {x.dtype for x in floors.at(torch.tensor([0.5])).values()} == {torch.float32}


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 target tokens, found 3"):
        measure_floors(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
