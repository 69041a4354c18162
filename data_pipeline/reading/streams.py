"""How a step's rows are shared out: over streams, ranks and micro-batches. The one place that checks these numbers."""

from typing import NamedTuple

from data_pipeline.core.errors import UserError

OPEN_AHEAD_STEPS = 32
"""Before a shard is due, it is opened (downloaded, hashed) this many steps ahead at least, or half a shard."""


def check_streams(streams: int, rows_per_step: int) -> None:
    """Raise UserError when a step cannot take equally many rows of each stream."""
    if streams < 1 or rows_per_step < 1 or rows_per_step % streams:
        some = max(1, streams)
        raise UserError(
            f"data.rows_per_step is {rows_per_step} and data.streams {streams}; a step takes equally many rows of each"
            f" stream: make rows_per_step a multiple, e.g. {max(1, -(-rows_per_step // some)) * some}"
        )


class Lane(NamedTuple):
    """Rows [place, place + num_rows) that one stream gives to a step; without a stream, filler."""

    stream: int | None
    place: int
    num_rows: int


def rank_rows(rows_per_step: int, world_size: int) -> int:
    """Rows of a step that every rank computes: an equal share, rounded up; what is left over is filler."""
    return -(-rows_per_step // world_size)


def rank_lanes(streams: int, rows_per_step: int, rank: int, world_size: int) -> list[Lane]:
    """Which rows of every step the rank takes: those whose number in the step, i, is congruent to it modulo the number of ranks.

    Row i is the (i // streams)-th of stream i % streams, so a rank has the same streams for ever. As many lanes on every rank.
    """
    if streams % world_size == 0:
        return [Lane(stream, 0, rows_per_step // streams) for stream in range(rank, streams, world_size)]
    rows = range(rank, rank_rows(rows_per_step, world_size) * world_size, world_size)
    return [Lane(i % streams if i < rows_per_step else None, i // streams, 1) for i in rows]


def idle_share(rows_per_step: int, world_size: int) -> float:
    """Share of all ranks' rows that is filler."""
    return 1 - rows_per_step / (rank_rows(rows_per_step, world_size) * world_size)


def open_ahead(stream: int, streams: int, shard_steps: int) -> int:
    """How many steps before its first row is due a stream opens its next shard.

    Equal streams reach their shards' ends in the same step. So each begins earlier by a part of a shard's length of its own, and what
    is opened in a step is about the same in every step. Always less than a shard, so that a stream never needs more than two.
    """
    latest = min(OPEN_AHEAD_STEPS, shard_steps // 2)
    return latest + (shard_steps - 1 - latest) * stream // max(1, streams)


def check_micro_batch(micro_batch_rows: int, rank_rows: int) -> None:
    """Raise UserError when a rank's rows of a step are not whole micro-batches."""
    if micro_batch_rows < 1 or rank_rows % micro_batch_rows:
        raise UserError(
            f"micro_batch_rows is {micro_batch_rows}, which does not divide a rank's {rank_rows} rows of a step: choose"
            f" a divisor of {rank_rows}"
        )


def largest_micro_batch(rank_rows: int, at_most: int) -> int:
    """The largest divisor of a rank's rows of a step within a bound."""
    return next(rows for rows in range(min(rank_rows, at_most), 0, -1) if rank_rows % rows == 0)
