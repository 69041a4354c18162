"""The loader: a rank's micro-batches of every step, prefetched by threads, and the batches of the held-out split.

A step is a pure function of its number, so threads build different steps side by side, a resumed loader starts
anywhere at once, and nothing has to be saved. Small steps are built several at a time, which spares most of Python's
share of the work. Threads rather than processes: the rest is NumPy copies and hashing, which release the GIL, and
nothing is left behind after a kill.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import CACHE_GIGABYTES
from data_pipeline.format.manifest import FeatureManifest, Manifest
from data_pipeline.reading.batch import Batch, RowBlock, RowId
from data_pipeline.reading.order import Order, Span
from data_pipeline.reading.settings import Split
from data_pipeline.reading.shard_pool import FeatureRows, TokenRows
from data_pipeline.reading.streams import check_micro_batch, open_ahead, rank_lanes, rank_rows

_OPENERS = 8
_STEPS_AHEAD = 2
_BLOCK_BYTES = 16 << 20  # of steps built together


class TrainLoader:
    """Iterates over steps; each gives the rank's micro-batches, in the order of their tickets. Never ends.

    Args:
        data: prepared folder (path or URL).
        features: feature cache made for it, or None.
        seed: of the order, the splits and the noise keys.
        streams: S. Changing it changes the order of training; changing the number of ranks does not.
        rows_per_step: rows of the global batch. Ranks that do not divide it get filler rows, so that all have equally many.
        micro_batch_rows: rows of one Batch; must divide the rank's rows of a step.
        start_step: first step to give; costs the same whatever it is.
        workers: threads that build steps, `_STEPS_AHEAD` of them ahead at least (0: built when asked for).
        verify: compare every shard's SHA-256 with the manifest before its first use.
        cache_dir, cache_gigabytes: where shards of URLs are kept, and how many; see storage.py.
        pin_memory: the threads leave batches in page-locked memory, for a GPU.

    Raises:
        UserError: numbers that do not divide, or shards that are not what the manifest says.
    """

    def __init__(
        self,
        data: str | Path,
        features: str | Path | None,
        *,
        seed: int,
        streams: int,
        rows_per_step: int,
        micro_batch_rows: int,
        split: Split,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        workers: int = 1,
        verify: bool = True,
        cache_dir: str | None = None,
        cache_gigabytes: float = CACHE_GIGABYTES,
        pin_memory: bool = False,
    ):
        self.manifest, self.feature_manifest = load_manifests(data, features)
        split.check_data(self.manifest, str(data))
        shard_rows = [shard.rows for shard in self.manifest.splits["train"]]
        self.order = Order(shard_rows, streams, rows_per_step, seed)
        self._lanes = rank_lanes(streams, rows_per_step, rank, world_size)
        self._streams = sorted({lane.stream for lane in self._lanes if lane.stream is not None})
        self._rank_rows = rank_rows(rows_per_step, world_size)
        check_micro_batch(micro_batch_rows, self._rank_rows)
        options: dict[str, Any] = {
            "verify": verify,
            "cache_dir": cache_dir,
            "cache_gigabytes": cache_gigabytes,
            "capacity": 2 * len(self._streams) + 2,
        }
        self._tokens = TokenRows(str(data), self.manifest, "train", **options)
        self._features = _feature_rows(features, self.feature_manifest, "train", options)
        self._seed, self._split, self._micro_batch_rows = seed, split, micro_batch_rows
        self._pin_memory = pin_memory
        self._start_step = self._next_step = start_step
        # Steps built together stay within an eighth of a shard, so that the last is not due long after the first.
        self._block_steps = max(1, min(self._block_limit(), min(shard_rows) // (8 * self.order.rows_per_stream)))
        self._blocks_ahead = max(1, workers, -(-_STEPS_AHEAD // self._block_steps))
        self._executor = ThreadPoolExecutor(workers, "loader") if workers else None
        self._openers = ThreadPoolExecutor(_OPENERS, "shards") if workers else None
        shard_steps = min(shard_rows) // self.order.rows_per_stream
        self._ahead = {stream: open_ahead(stream, streams, shard_steps) for stream in self._streams}
        self._pending: deque[Future[list[list[Batch]]]] = deque()
        self._ready: deque[list[Batch]] = deque()
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[list[Batch]]:
        while True:
            yield self.next_step()

    def next_step(self) -> list[Batch]:
        """The micro-batches of the next step; the time spent waiting for them is added to `wait_seconds`."""
        started = time.perf_counter()
        try:
            if not self._ready:
                self._ready.extend(self._next_block())
            return self._ready.popleft()
        finally:
            self.wait_seconds += time.perf_counter() - started

    def build(self, step: int) -> list[Batch]:
        """The rank's micro-batches of any step."""
        return self._build_block(step, 1)[0]

    def close(self) -> None:
        """Stop prefetching."""
        for executor in (self._executor, self._openers):
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()
        self._ready.clear()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _next_block(self) -> list[list[Batch]]:
        """The next steps, as many as are built together."""
        if self._executor is None:
            return self._build_block(*self._advance())
        if not self._pending:
            self._open_shards(dict.fromkeys(self._streams, self._next_step), 1)
        while len(self._pending) < self._blocks_ahead:
            self._pending.append(self._executor.submit(self._build_block, *self._advance()))
        block = self._pending.popleft().result()
        self._pending.append(self._executor.submit(self._build_block, *self._advance()))
        return block

    def _build_block(self, step: int, steps: int) -> list[list[Batch]]:
        """The rank's micro-batches of consecutive steps."""
        if step != self._start_step:  # nothing is opened beside the shards of the first batch, which somebody waits for
            self._open_shards({stream: step + ahead for stream, ahead in self._ahead.items()}, steps)
        spans = [self.order.lane_spans(lane, step, steps) for lane in self._lanes]
        tickets = np.stack([self.order.lane_tickets(lane, step, steps) for lane in self._lanes], axis=1)
        block = read_rows(self._tokens, self._features, spans, tickets, "train", self._seed, self._split)
        starts = range(0, steps * self._rank_rows, self._micro_batch_rows)
        batches = [block.batch(start, start + self._micro_batch_rows) for start in starts]
        if self._pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        per_step = self._rank_rows // self._micro_batch_rows
        return [batches[first : first + per_step] for first in range(0, len(batches), per_step)]

    def _open_shards(self, firsts: dict[int, int], steps: int) -> None:
        """Start opening, side by side, the shards that a stream reads in so many steps from its own first on, those that are not open."""
        if self._openers is None:
            return
        for shard in {span.shard for stream, step in firsts.items() for span in self.order.spans(stream, step, steps)}:
            for rows in (self._tokens, self._features):
                if rows is not None and not rows.is_open(shard):
                    self._openers.submit(
                        rows.open, shard
                    )  # a failure shows again, and is raised, when its rows are due

    def _advance(self) -> tuple[int, int]:
        """First step and number of steps of the next block; the very first block is one step, to be there soon."""
        step, steps = self._next_step, 1 if self._next_step == self._start_step else self._block_steps
        self._next_step += steps
        return step, steps

    def _block_limit(self) -> int:
        """Number of steps that _BLOCK_BYTES hold."""
        members = self._features.arrays.values() if self._features else ()
        row_bytes = 8 * self.manifest.row_tokens + sum(member.row_bytes for member in members)
        return _BLOCK_BYTES // (self._rank_rows * row_bytes)


def read_rows(
    tokens: TokenRows,
    features: FeatureRows | None,
    spans: Sequence[Sequence[Span]],
    tickets: np.ndarray,
    split_name: str,
    seed: int,
    split: Split,
) -> RowBlock:
    """Read the spans of several streams and interleave their rows by ticket.

    Args:
        spans: for each of S streams the spans that hold its rows, in order; where they end early, filler rows follow.
        tickets: [Q, S], Q rows per stream; increasing in reading order (row by row).
    """
    num_rows, num_streams = tickets.shape
    tokens_QSR = np.empty((num_rows, num_streams, tokens.row_tokens), dtype=np.int64)
    members = features.arrays.values() if features else ()
    coded = {member.name: np.empty((num_rows, num_streams, *member.shape), member.dtype) for member in members}
    counts_SQ = np.zeros((num_streams, num_rows), dtype=np.int64)
    origin_QS3 = np.full((num_rows, num_streams, 3), -1)
    lengths, contexts = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for stream, stream_spans in enumerate(spans):
        place = 0
        for span in stream_spans:
            rows = slice(place, place := place + span.stop - span.start)
            tokens_QSR[rows, stream], span_lengths, counts_SQ[stream, rows], span_contexts = tokens.read_flat(span)
            lengths.append(span_lengths)
            if span_contexts is not None:
                contexts.append(span_contexts)
            origin_QS3[rows, stream, 0], origin_QS3[rows, stream, 2] = span.shard, span.epoch
            origin_QS3[rows, stream, 1] = np.arange(span.start, span.stop)
            for name, array in features.read(span).items() if features else ():
                coded[name][rows, stream] = array
        tokens_QSR[place:, stream] = 0
        for array in coded.values():
            array[place:, stream] = 0
    tokens_BR = tokens_QSR.reshape(-1, tokens.row_tokens)
    # RowId(ticket, split, shard, row, epoch) of every row, without a call of Python's for each.
    columns = tickets.ravel().tolist(), repeat(split_name), *origin_QS3.reshape(-1, 3).T.tolist()
    ids = list(map(partial(tuple.__new__, RowId), zip(*columns)))
    places_W, counts_B = _transpose_windows(counts_SQ)
    arrays = [array.reshape(-1, *array.shape[2:]) for array in coded.values()]
    coded_features = (arrays[0], arrays[1]) if arrays else None
    contexts_W = np.concatenate(contexts)[places_W] if split.kind == "data" else None
    lengths_W = np.concatenate(lengths)[places_W]
    return RowBlock(tokens_BR, lengths_W, counts_B, ids, seed, split, coded_features, contexts_W)


def _transpose_windows(counts_SQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every window in the order of the tickets, its place in the order stream by stream; and the counts of the rows in the
    tickets' order.
    """
    starts_QS = (np.cumsum(counts_SQ) - counts_SQ.ravel()).reshape(counts_SQ.shape).T
    counts_B = counts_SQ.T.ravel()
    new_starts_B = np.cumsum(counts_B) - counts_B
    places_W = np.arange(counts_B.sum()) + np.repeat(starts_QS.ravel() - new_starts_B, counts_B)
    return places_W, counts_B


def heldout_batches(
    data: str | Path,
    features: str | Path | None,
    *,
    split: Split,
    seed: int,
    micro_batch_rows: int,
    rank: int = 0,
    world_size: int = 1,
    max_rows: int | None = None,
    **options: Any,
) -> Iterator[Batch]:
    """The rank's batches of the held-out split, the same at every call; a row's ticket is its index in the split.

    Every rank gets the same number of batches of micro_batch_rows rows; places behind the last row are filler. `options`: of `TokenRows`.
    """
    manifest, feature_manifest = load_manifests(data, features)
    split.check_data(manifest, str(data))
    infos = manifest.splits["heldout"]
    if not infos:
        raise UserError(f"{data} has no held-out split: prepare the data again with --heldout-fraction 0.005")
    tokens = TokenRows(str(data), manifest, "heldout", **options)
    cached = _feature_rows(features, feature_manifest, "heldout", options)
    ends = np.cumsum([info.rows for info in infos])
    num_rows = min(int(ends[-1]), max_rows or int(ends[-1]))
    rows_per_round = micro_batch_rows * world_size
    for first in range(0, num_rows, rows_per_round):
        start = first + rank * micro_batch_rows
        spans = list(_heldout_spans(ends, start, min(start + micro_batch_rows, num_rows)))
        tickets = np.arange(start, start + micro_batch_rows, dtype=np.int64)[:, None]
        yield read_rows(tokens, cached, [spans], tickets, "heldout", seed, split).batch(0, micro_batch_rows)


def _feature_rows(
    folder: str | Path | None, manifest: FeatureManifest | None, split: str, options: dict[str, Any]
) -> FeatureRows | None:
    return FeatureRows(str(folder), manifest, split, **options) if manifest else None


def _heldout_spans(ends: np.ndarray, start: int, stop: int) -> Iterator[Span]:
    """Rows [start, stop) of the split as spans of its shards."""
    while start < stop:
        shard = int(np.searchsorted(ends, start, side="right"))
        first = int(ends[shard - 1]) if shard else 0
        end = min(stop, int(ends[shard]))
        yield Span(0, shard, start - first, end - first)
        start = end


def load_manifests(data: str | Path, features: str | Path | None) -> tuple[Manifest, FeatureManifest | None]:
    """Manifests of a prepared folder and of its feature cache; UserError if they do not belong together."""
    manifest = Manifest.load(data)
    if features is None:
        return manifest, None
    feature_manifest = FeatureManifest.load(features)
    feature_manifest.check_matches(manifest, features)
    return manifest, feature_manifest
