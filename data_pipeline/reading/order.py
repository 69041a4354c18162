"""The order of training: which rows of which shards make up step s. Pure functions of (manifest, seed, step).

Shard i belongs to stream i mod S. A stream reads its shards front to back, in an order that a keyed permutation draws
anew for each epoch, and never ends. Step s takes the next q = rows_per_step / S rows of every stream, so a position in
training is one integer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import permutation
from data_pipeline.reading.streams import Lane, check_streams


class Span(NamedTuple):
    """Consecutive rows [start, stop) of one shard."""

    epoch: int
    shard: int
    start: int
    stop: int


class Order:
    """Order of the rows of one split, for S streams and a fixed number of rows per step.

    Args:
        shard_rows: number of rows of each shard, in the manifest's order.
        streams: S, fixed by the config.
        rows_per_step: rows of the global batch, a multiple of S.

    Raises:
        UserError: the streams cannot be served: no rows, fewer shards than streams, or a batch that S does not divide.
    """

    def __init__(self, shard_rows: Sequence[int], streams: int, rows_per_step: int, seed: int):
        check_streams(streams, rows_per_step)
        if len(shard_rows) < streams:
            raise UserError(
                f"data.streams = {streams}, but the data has {len(shard_rows)} train shards and a stream needs at "
                "least one: "
                f"lower data.streams, or prepare the data again with --shards {streams} or a multiple of it"
            )
        if min(shard_rows) < 1:
            raise UserError(
                f"train shard {list(shard_rows).index(min(shard_rows))} holds no rows: prepare the data again"
            )
        self.streams = streams
        self.rows_per_step = rows_per_step
        self.rows_per_stream = rows_per_step // streams
        self._seed = seed
        self._shards = [np.arange(stream, len(shard_rows), streams) for stream in range(streams)]
        self._rows = np.asarray(shard_rows, dtype=np.int64)
        self._epoch_rows = [int(self._rows[shards].sum()) for shards in self._shards]
        self._recent: dict[tuple[int, int], tuple[int, np.ndarray, np.ndarray]] = {}

    def spans(self, stream: int, step: int, steps: int = 1) -> list[Span]:
        """The rows that the stream gives to so many steps from this one on, as few contiguous spans as possible, in
        reading order.
        """
        return self._spans(stream, step * self.rows_per_stream, steps * self.rows_per_stream)

    def lane_spans(self, lane: Lane, step: int, steps: int = 1) -> list[Span]:
        """The rows of a lane, in reading order; none for filler."""
        if lane.stream is None:
            return []
        if lane.num_rows == self.rows_per_stream:
            return self.spans(lane.stream, step, steps)
        starts = [number * self.rows_per_stream + lane.place for number in range(step, step + steps)]
        return [span for start in starts for span in self._spans(lane.stream, start, lane.num_rows)]

    def lane_tickets(self, lane: Lane, step: int, steps: int = 1) -> np.ndarray:
        """Global numbers, in training order, of a lane's rows (int64 [steps * num_rows]); filler is numbered -1."""
        if lane.stream is None:
            return np.full(steps * lane.num_rows, -1, dtype=np.int64)
        each = self.rows_per_stream
        starts = np.arange(step * each, (step + steps) * each, each, dtype=np.int64)
        places = np.add.outer(starts, np.arange(lane.place, lane.place + lane.num_rows))
        return places.ravel() * self.streams + lane.stream

    def _spans(self, stream: int, position: int, remaining: int) -> list[Span]:
        """So many rows of a stream from this one on."""
        spans = []
        while remaining:
            epoch, offset = divmod(position, self._epoch_rows[stream])
            shards, ends = self._epoch(stream, epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            shard, left = int(shards[place]), int(ends[place]) - offset
            start, count = int(self._rows[shard]) - left, min(left, remaining)
            spans.append(Span(epoch, shard, start, start + count))
            position, remaining = position + count, remaining - count
        return spans

    def _epoch(self, stream: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream's shards in the epoch's order and the running sum of their rows. The latest even and the latest odd
        epoch are remembered: towards an epoch's end, shards of the next one are opened ahead.
        """
        slot = stream, epoch % 2
        recent = self._recent.get(slot)
        if recent is None or recent[0] != epoch:
            own = self._shards[stream]
            shards = own[permutation(len(own), self._seed, "shards", stream, epoch)]
            recent = self._recent[slot] = (epoch, shards, np.cumsum(self._rows[shards]))
        return recent[1], recent[2]
