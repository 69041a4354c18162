"""Windows lose no token of a kept document; rows hold whole windows and are full."""

import numpy as np
import pytest

from data_pipeline.prepare.pack import fill_row, pack_rows, window_lengths


@pytest.mark.parametrize("min_window", [1, 3, 8])
@pytest.mark.parametrize("max_window", [16, 17, 50])
def test_windows_of_every_document_length(min_window: int, max_window: int) -> None:
    for length in range(200):
        windows = window_lengths(length, min_window, max_window)
        if length < min_window:
            assert windows == []
            continue
        assert sum(windows) == length
        assert min(windows) >= min_window
        assert max(windows) <= max_window
        assert len(windows) == -(-length // max_window)


@pytest.mark.parametrize("row_tokens", [64, 100, 256])
@pytest.mark.parametrize("count", [0, 1, 5, 2000])
def test_rows_hold_every_window_once_and_never_overflow(row_tokens: int, count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 65, count)
    rows = pack_rows(lengths, row_tokens)
    assert sorted(window for row in rows for window in row) == list(range(count))
    assert all(lengths[row].sum() <= row_tokens for row in rows)
    if count == 2000:
        # rows no longer than the longest window leave the least choice
        assert lengths.sum() / (len(rows) * row_tokens) > (0.975 if row_tokens == 64 else 0.995)


def test_fill_is_high_where_decreasing_order_is_poor() -> None:
    """Story-like lengths, all near each other, in short rows: best-fit decreasing reaches 97.8 % here."""
    lengths = np.random.default_rng(0).gamma(20, 10, 5000).astype(np.int64).clip(8, 1024)
    assert lengths.sum() / (len(pack_rows(lengths, 1024)) * 1024) > 0.995


def test_windows_of_one_length_do_not_gather() -> None:
    """Rows mix lengths: a row of long windows only, or of short ones only, would make steps uneven."""
    lengths = np.random.default_rng(0).permutation(np.repeat([10, 50], [1000, 200]))
    rows = pack_rows(lengths, 200)
    mixed = sum(len(set(lengths[row].tolist())) == 2 for row in rows)
    assert mixed > 0.6 * len(rows)


def test_unfillable_windows_still_find_a_row() -> None:
    assert len(pack_rows(np.full(7, 60), 100)) == 7


def test_fill_row_copies_windows_and_leaves_zeros() -> None:
    tokens = np.arange(1, 31, dtype=np.uint16)
    row, lengths = fill_row(tokens, np.array([0, 20]), np.array([4, 6]), [1, 0], 12)
    assert row.tolist() == [21, 22, 23, 24, 25, 26, 1, 2, 3, 4, 0, 0]
    assert lengths.tolist() == [6, 4]
    assert (row.dtype, lengths.dtype) == (np.uint16, np.int32)
