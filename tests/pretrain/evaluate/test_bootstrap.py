"""95 % intervals hold the truth in 95 % of cases."""

import numpy as np
import pytest

from pretrain.evaluate.bootstrap import mean, of_all, ratio_of_sums


def held(intervals: list, truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def test_coverage_of_means_over_200_repetitions_of_a_skewed_distribution() -> None:
    drawn = np.random.default_rng(0)
    found = [mean(drawn.exponential(2.0, size=100), seed) for seed in range(200)]
    assert 0.92 <= held(found, 2.0) <= 0.98


def test_coverage_of_ratios_over_documents_of_very_different_lengths() -> None:
    """Nats a token: long documents weigh more, and here have fewer nats a token."""
    drawn = np.random.default_rng(1)
    found = []
    for seed in range(200):
        tokens = drawn.integers(5, 200, size=120)
        found.append(ratio_of_sums(tokens * (3 + 20 / tokens + drawn.normal(0, 0.8, size=120)), tokens, seed))
    assert 0.92 <= held(found, 3 + 20 / np.mean(np.arange(5, 200))) <= 0.98


def test_coverage_of_figures_of_all_documents_together() -> None:
    """The median, which is no mean of anything, by halves of the documents."""
    drawn = np.random.default_rng(2)
    found = []
    for seed in range(200):
        values = np.sort(drawn.normal(1.0, 1.0, size=100))
        found.append(of_all(lambda counts_N, v=values: float(np.median(np.repeat(v, counts_N))), 100, 100, seed))
    assert 0.90 <= held(found, 1.0) <= 0.99


def test_intervals_of_constant_figures_have_no_width_and_of_one_document_no_ends() -> None:
    assert mean([0.25] * 10)[:3] == (0.25, 0.25, 0.25)
    one = mean([0.5])
    assert one.value == 0.5
    assert np.isnan(one.low)


def test_a_ratio_is_of_sums_and_intervals_shrink_with_the_root_of_the_documents() -> None:
    assert ratio_of_sums([1, 9], [1, 3]).value == 2.5
    drawn = np.random.default_rng(3)
    few, many = (mean(drawn.normal(size=n)) for n in (100, 1600))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.25)


def test_an_interval_goes_no_further_than_the_figure_can() -> None:
    shares = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    free, held_in = (
        of_all(lambda counts_N: float(np.average(shares, weights=counts_N)), 6, 100, **more)
        for more in ({}, {"within": (0, 1)})
    )
    assert free.high > 1 == held_in.high
    assert held_in[:2] == free[:2]
