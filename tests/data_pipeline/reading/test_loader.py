"""The global batch is a pure function of (manifest, seed, step), however ranks, threads and micro-batches cut it up."""

import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.reading.batch import FILLER, Batch, Split
from data_pipeline.reading.loader import TrainLoader, heldout_batches
from data_pipeline.reading.shard_pool import ShardPool
from tests.data_pipeline.conftest import write_prepared

STREAMS, ROWS_PER_STEP, STEPS = 12, 24, 5
SPLIT = Split(kind="context")


def make_loader(data: Path, **changes: object) -> TrainLoader:
    arguments = {
        "seed": 7,
        "streams": STREAMS,
        "rows_per_step": ROWS_PER_STEP,
        "micro_batch_rows": 1,
        "split": SPLIT,
        "workers": 0,
    }
    features = changes.pop("features", None)
    return TrainLoader(data, features, **(arguments | changes))


def rows_of(batch: Batch) -> list[tuple]:
    """Everything that training sees of each row, comparable with ==."""
    rows, window, segment = [], 0, 0
    for index, row in enumerate(batch.rows):
        tokens = batch.tokens_T[index * batch.row_tokens : (index + 1) * batch.row_tokens]
        windows, segments, total = [], [], 0
        while total < batch.row_tokens:
            windows.append((batch.window_lengths[window], *batch.window_uniforms_W2[window].tolist()))
            while segment < len(batch.segment_windows) and batch.segment_windows[segment] == window:
                segments.append((batch.segment_lengths[segment], batch.segment_roles[segment], len(windows)))
                segment += 1
            total, window = total + windows[-1][0], window + 1
        rows.append((row, tuple(tokens.tolist()), tuple(windows), tuple(segments), int(batch.row_keys_B[index])))
    assert window == len(batch.window_lengths)
    assert segment == len(batch.segment_lengths)
    return rows


def global_batches(data: Path, world_size: int, steps: int = STEPS, **changes: object) -> list[list[tuple]]:
    """For every step all rows of all ranks, sorted by ticket."""
    result: list[list[tuple]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        with make_loader(data, rank=rank, world_size=world_size, **changes) as loader:
            for step, batches in enumerate(islice(loader, steps)):
                rows = [row for batch in batches for row in rows_of(batch)]
                real = [row for row in rows if row[0].ticket >= 0]
                assert real == sorted(real, key=lambda row: row[0].ticket)
                assert rows[len(real) :] == [row for row in rows if row[0].ticket < 0]
                assert all(role == FILLER for row in rows[len(real) :] for _, role, _ in row[3])
                result[step] += real
    return [sorted(rows, key=lambda row: row[0].ticket) for rows in result]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_global_batch_is_the_same_for_any_ranks_and_workers(prepared: Path, world_size: int, workers: int) -> None:
    expected = global_batches(prepared, 1)
    assert [row[0].ticket for rows in expected for row in rows] == list(range(STEPS * ROWS_PER_STEP))
    micro_batch_rows = 2 if world_size != 12 else 1
    found = global_batches(prepared, world_size, workers=workers, micro_batch_rows=micro_batch_rows)
    assert found == expected


@pytest.mark.parametrize("world_size", [5, 7, 16, 24, 30])
def test_ranks_that_divide_nothing_see_the_same_global_batch(prepared: Path, world_size: int) -> None:
    expected = global_batches(prepared, 1)
    assert global_batches(prepared, world_size, workers=2) == expected
    assert global_batches(prepared, world_size, steps=2, start_step=3) == expected[3:]


def test_resume_at_any_step_continues_the_same_sequence(prepared: Path) -> None:
    straight = global_batches(prepared, 2, steps=9)
    assert global_batches(prepared, 3, steps=4, start_step=5, workers=2) == straight[5:]


def test_every_row_once_per_epoch_of_a_stream(prepared: Path) -> None:
    loader = make_loader(prepared, streams=1, rows_per_step=1)
    total = sum(shard.rows for shard in loader.manifest.splits["train"])
    rows = [batches[0].rows[0] for batches in islice(loader, 2 * total)]
    first, second = rows[:total], rows[total:]
    assert len({(row.shard, row.row) for row in first}) == total
    assert {row.epoch for row in first} == {0}
    assert {(row.shard, row.row) for row in first} == {(row.shard, row.row) for row in second}
    assert [row.shard for row in first] != [row.shard for row in second]


def test_resume_opens_only_the_shards_of_the_step(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = ShardPool._open_shard
    monkeypatch.setattr(ShardPool, "_open_shard", lambda pool, i: opened.append(i) or original(pool, i))
    make_loader(prepared, start_step=10**7, rows_per_step=STREAMS).next_step()
    assert len(opened) == STREAMS


def test_features_line_up_with_their_tokens(prepared: Path) -> None:
    loader = make_loader(prepared, features=prepared / "features", world_size=3, rank=1, micro_batch_rows=4, workers=2)
    with loader:
        for batches in islice(loader, 3):
            for batch in batches:
                assert batch.features is not None
                codes = batch.features.codes_TC.view(4, batch.row_tokens, -1)
                for index, row in enumerate(batch.rows):
                    assert codes[index, 3, 2] == 3 + 2000 + 64 * row.row + 7 * row.shard
                scales = batch.features.scales_T.view(4, -1)
                assert scales[:, 0].tolist() == [row.row for row in batch.rows]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"streams": 26, "rows_per_step": 26}, "26"),
        ({"rows_per_step": 25}, "rows_per_step"),
        ({"micro_batch_rows": 5}, "micro_batch_rows"),
    ],
)
def test_numbers_that_do_not_divide_are_refused(prepared: Path, changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        make_loader(prepared, **changes)


def test_heldout_covers_every_row_once_with_equal_batches_per_rank(prepared: Path) -> None:
    per_rank = [
        list(heldout_batches(prepared, None, split=SPLIT, seed=1, micro_batch_rows=2, rank=rank, world_size=4))
        for rank in range(4)
    ]
    assert {len(batches) for batches in per_rank} == {2}
    rows = sorted(row for batches in per_rank for batch in batches for row in rows_of(batch))
    real = [row for row in rows if row[0].shard >= 0]
    assert [(row[0].shard, row[0].row) for row in real] == [(0, r) for r in range(5)] + [(1, r) for r in range(6)]
    alone = heldout_batches(prepared, None, split=SPLIT, seed=1, micro_batch_rows=11)
    assert [row for batch in alone for row in rows_of(batch)] == real
    assert all(set(row[1]) == {0} for row in rows if row[0].shard < 0)


def test_heldout_max_rows(prepared: Path) -> None:
    batches = list(heldout_batches(prepared, None, split=SPLIT, seed=1, micro_batch_rows=4, max_rows=6))
    assert [row.shard >= 0 for batch in batches for row in batch.rows] == [True] * 6 + [False] * 2


def test_an_error_in_a_worker_reaches_the_consumer(prepared: Path, tmp_path: Path) -> None:
    for path in prepared.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for path in tmp_path.glob("train-*.tar"):
        path.write_bytes(path.read_bytes()[:-700])
    with make_loader(tmp_path, workers=3) as loader, pytest.raises(UserError, match=r"train-0.*manifest says"):
        loader.next_step()


def test_feature_cache_of_other_tokens_is_refused(prepared: Path, tmp_path: Path) -> None:
    write_prepared(tmp_path, [3] * 12, [2], seed=5)
    with pytest.raises(UserError, match="fingerprint"):
        make_loader(tmp_path, features=prepared / "features")


def test_batches_are_tensors_of_the_promised_types(prepared: Path) -> None:
    [batch, *_] = make_loader(prepared, micro_batch_rows=12).next_step()
    assert batch.tokens_T.dtype == torch.int64
    assert batch.window_uniforms_W2.shape == (len(batch.window_lengths), 2)
    assert batch.row_keys_B.dtype == torch.int64
    assert int(batch.row_keys_B.min()) >= 0
    assert sum(batch.window_lengths) == sum(batch.segment_lengths) == len(batch.tokens_T) == 12 * batch.row_tokens
    assert batch.roles_T.shape == batch.tokens_T.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_leave_all_that_goes_to_a_gpu_in_pinned_memory(
    prepared: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """And not the main thread, which would copy while the device waits for work."""
    pinned: dict[int, str] = {}

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        pinned[id(copy)] = threading.current_thread().name
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    with make_loader(prepared, features=prepared / "features", pin_memory=True, workers=workers) as loader:
        for batch in loader.next_step():
            sent = [batch.tokens_T, batch.window_uniforms_W2, batch.features.codes_TC, batch.features.scales_T]
            assert {pinned[id(tensor)].partition("_")[0] for tensor in sent} == {"loader" if workers else "MainThread"}
    with make_loader(prepared, workers=0) as loader:
        before = len(pinned)
        loader.next_step()
    assert len(pinned) == before


@pytest.mark.parametrize("start", [0, 33, 39])
def test_shards_are_open_before_their_rows_are_due(start: int, tmp_path: Path) -> None:
    """From the step behind the first on, which waits for its own shards alone."""
    write_prepared(tmp_path, [40] * 8, [1])
    with make_loader(tmp_path, streams=2, rows_per_step=2, workers=1, start_step=start) as loader:
        for step in range(start, start + 100):
            loader.next_step()
            due = {span.shard for stream in (0, 1) for span in loader.order.spans(stream, step + 10)}
            deadline = time.monotonic() + 30  # nobody asks for their rows meanwhile
            while not all(loader._tokens.is_open(shard) for shard in due):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            assert len(loader._tokens._pool._open) <= 6


@pytest.mark.parametrize("start", [0, 33])
def test_beside_the_shards_of_the_first_batch_none_are_opened(start: int, tmp_path: Path) -> None:
    write_prepared(tmp_path, [40] * 8, [1])
    with make_loader(tmp_path, streams=2, rows_per_step=2, workers=1, start_step=start) as loader:
        loader._build_block(start, 1)
        assert loader._openers is not None
        loader._openers.shutdown(wait=True)
        due = {span.shard for stream in (0, 1) for span in loader.order.spans(stream, start)}
        assert {shard for shard in range(8) if loader._tokens.is_open(shard)} == due
