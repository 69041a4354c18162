"""Intervals of figures over documents, by resampling the documents (Efron and Tibshirani 1993; Shao and Wu 1989).

Shape letters: N documents, R resamplings.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.core.keys import generator
from pretrain.diagnose.text_checks import halves_error

RESAMPLINGS = 2000
COVERAGE = 0.95


class Interval(NamedTuple):
    """A figure, the ends of its 95 % interval, and the number of documents that it is of."""

    value: float
    low: float
    high: float
    n: int


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """Sum over sum, for example nats over tokens: a mean where denominators are all 1.

    The ends are those between which the resampled ratios lie in 95 % of cases, in units of their own standard error, by which a skewed
    figure's interval is wider on its long side (the bootstrap-t).
    """
    over_N, under_N = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    n = len(over_N)
    value = over_N.sum() / under_N.sum()
    if n < 2:
        return Interval(value, float("nan"), float("nan"), n)
    counts_RN = generator(seed, "bootstrap", n).multinomial(n, np.full(n, 1 / n), size=RESAMPLINGS).astype(np.float64)
    under_R = np.maximum(counts_RN @ under_N, 1e-300)
    ratios_R = counts_RN @ over_N / under_R
    # Of the residuals over_i - ratio * under_i, expanded: R x N numbers are never held as floats at once.
    squares_R = (
        counts_RN @ over_N**2 - 2 * ratios_R * (counts_RN @ (over_N * under_N)) + ratios_R**2 * (counts_RN @ under_N**2)
    )
    errors_R = np.sqrt(np.maximum(squares_R, 0)) / under_R
    error = np.sqrt(np.sum((over_N - value * under_N) ** 2)) / under_N.sum()
    if error == 0:
        return Interval(value, value, value, n)
    known_R = errors_R > 1e-9 * error
    t_low, t_high = np.quantile(
        (ratios_R[known_R] - value) / errors_R[known_R], [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2]
    )
    return Interval(value, value - t_high * error, value - t_low * error, n)


def mean(values: Sequence[float], seed: int = 0) -> Interval:
    """Of one number a document."""
    return ratio_of_sums(values, [1.0] * len(values), seed)


def of_all(
    statistic: Callable[[np.ndarray], float],
    n: int,
    resamplings: int,
    seed: int = 0,
    within: tuple[float, float] = (-np.inf, np.inf),
) -> Interval:
    """Of a figure of all documents together, such as the share of different n-grams, by random halves of them (`halves_error`).

    Args:
        statistic: takes which documents count, int64 zeros and ones [N].
        within: what the figure can be; its interval goes no further.
    """

    def of_some(chosen: np.ndarray) -> float:
        counts_N = np.zeros(n, dtype=np.int64)
        counts_N[chosen] = 1
        return statistic(counts_N)

    value, spread = of_some(np.arange(n)), 1.96 * halves_error(of_some, n, resamplings, seed)
    low, high = np.clip((value - spread, value + spread), *within).tolist()
    return Interval(value, low, high, n)
