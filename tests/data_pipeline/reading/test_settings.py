"""The section `data`: how many rows a rank computes at a time, and what cannot be drawn."""

from typing import Any

import pytest

from data_pipeline.reading.settings import Data


def data(**changes: Any) -> Data:
    values: dict[str, Any] = {
        "path": "x",
        "streams": 192,
        "rows_per_step": 192,
        "micro_batch_rows": 3,
        "split": {"kind": "none"},
    }
    return Data(**values | changes)


@pytest.mark.parametrize(
    ("most", "ranks", "at_most", "expected"),
    [
        (3, 8, None, 3),
        (3, 24, None, 2),
        (6, 24, None, 4),
        (500, 24, None, 8),
        (7, 1, None, 6),
        (6, 1, 5, 4),
        (1, 192, 9, 1),
    ],
)
def test_a_micro_batch_is_the_largest_divisor_within_its_bound(
    most: int, ranks: int, at_most: int | None, expected: int
) -> None:
    assert data(micro_batch_rows=most).micro_batch(ranks, at_most) == expected


def test_all_ranks_have_equally_many_rows_filler_included() -> None:
    assert [data().rank_rows(ranks) for ranks in (1, 5, 8, 192, 512)] == [192, 39, 24, 1, 1]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"streams": 5}, "make rows_per_step a multiple, e.g. 195"),
        ({"split": {"kind": "context", "context_min": 0.9, "context_max": 0.1}}, "expected 0 < min <= max < 1"),
        ({"split": {"kind": "context", "context_max": 1.0}}, "expected 0 < min <= max < 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        data(**changes)
