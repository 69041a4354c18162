"""Windows and segments tile the rows; splits have the promised distribution and are keyed by the row alone."""

import numpy as np
import pytest

from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch, RowBlock, RowId, Split

R = 128


def batch_of(row_windows: list[list[int]], split: Split, first_ticket: int = 0, seed: int = 3) -> Batch:
    tokens = np.arange(len(row_windows) * R).reshape(-1, R)
    rows = [RowId(first_ticket + i, "train", 0, i, 0) for i in range(len(row_windows))]
    lengths = np.array([length for windows in row_windows for length in windows], np.int32)
    block = RowBlock(tokens, lengths, np.array([len(windows) for windows in row_windows]), rows, seed, split)
    return block.batch(0, len(rows))


def test_windows_and_segments_tile_the_rows() -> None:
    batch = batch_of([[100, 20], [128], [], [3, 60, 64]], Split(kind="none"))
    assert batch.window_lengths == [100, 20, 8, 128, 128, 3, 60, 64, 1]
    assert batch.segment_lengths == batch.window_lengths
    assert batch.segment_roles == [PREFIX, PREFIX, FILLER, PREFIX, FILLER, PREFIX, PREFIX, PREFIX, FILLER]
    assert batch.segment_windows == list(range(9))
    assert batch.num_tokens(FILLER) == 8 + 128 + 1
    assert batch.num_tokens(PREFIX, SUFFIX) == 4 * R - 137


def test_context_splits_every_window_that_is_long_enough() -> None:
    split = Split(kind="context", context_min=0.2, context_max=0.6, min_tokens=5)
    batch = batch_of([[100, 9, 10]] * 500, split)
    shares = []
    for window, length in enumerate(batch.window_lengths):
        parts = [
            (n, role)
            for n, role, w in zip(batch.segment_lengths, batch.segment_roles, batch.segment_windows)
            if w == window
        ]
        assert sum(n for n, _ in parts) == length
        if length == 100:
            assert [role for _, role in parts] == [PREFIX, SUFFIX]
            shares.append(parts[0][0] / 100)
        elif length == 10 and window % 4 == 2:
            assert parts == [(5, PREFIX), (5, SUFFIX)]
        else:
            assert [role for _, role in parts] == [FILLER if window % 4 == 3 else SUFFIX]
    assert min(shares) >= 0.2
    assert max(shares) <= 0.6
    assert abs(np.mean(shares) - 0.4) < 0.02
    assert abs(np.std(shares) - 0.4 / 12**0.5) < 0.01


def test_truncation_keeps_all_tokens_and_cuts_uniformly() -> None:
    batch = batch_of([[R]] * 3000, Split(kind="truncate", truncate_probability=0.3, min_tokens=4))
    assert sum(batch.segment_lengths) == 3000 * R
    cut = [n for n, role in zip(batch.segment_lengths, batch.segment_roles) if role == PREFIX and n < R]
    assert abs(len(cut) / 3000 - 0.3) < 0.03
    assert min(cut) == 4
    assert max(cut) == R - 4
    assert abs(np.mean(cut) - R / 2) < 5
    assert batch.segment_roles.count(SUFFIX) == len(cut)


@pytest.mark.parametrize("kind", ["truncate", "context"])
def test_a_row_is_the_same_in_any_batch(kind: str) -> None:
    windows = [[40, 30, 50], [60, 60], [128], [20] * 6]
    together = batch_of(windows, Split(kind=kind), first_ticket=10)
    place = 0
    for row in range(4):
        alone = batch_of([windows[row]], Split(kind=kind), first_ticket=10 + row)
        count = len(alone.segment_lengths)
        assert together.segment_lengths[place : place + count] == alone.segment_lengths
        assert together.row_keys_B[row] == alone.row_keys_B[0]
        place += count
    uniforms = [
        batch_of([windows[row]], Split(kind=kind), first_ticket=10 + row).window_uniforms_W2 for row in range(4)
    ]
    assert together.window_uniforms_W2.tolist() == np.concatenate(uniforms).tolist()


def test_tickets_and_seeds_change_everything_random() -> None:
    split = Split(kind="context")
    a, b, c = (batch_of([[100, 20]], split, ticket, seed) for ticket, seed in ((0, 3), (1, 3), (0, 4)))
    keys = {int(x.row_keys_B[0]) for x in (a, b, c)}
    uniforms = {float(u) for x in (a, b, c) for u in x.window_uniforms_W2.flatten()}
    assert len(keys) == 3
    assert len(uniforms) == 18


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "cut"}, {"truncate_probability": 1.5}, {"context_min": 0.9, "context_max": 0.1}, {"min_tokens": 0}],
)
def test_impossible_splits_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Split(**{"kind": "context"} | wrong)


@pytest.mark.parametrize("kind", ["none", "context", "truncate"])
def test_places_of_a_role_are_where_the_roles_say(kind: str) -> None:
    batch = batch_of([[10, 30], [40], [3, 3, 20]], Split(kind=kind, min_tokens=2))
    expected = np.repeat(batch.segment_roles, batch.segment_lengths)
    assert batch.roles_T.tolist() == expected.tolist()
    for role in (FILLER, PREFIX, SUFFIX):
        places = batch.places(role)
        assert places.tolist() == np.flatnonzero(expected == role).tolist()
        assert len(places) == batch.num_tokens(role)
