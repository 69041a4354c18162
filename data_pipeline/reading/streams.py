"""How a step's rows are shared out: over streams, ranks and micro-batches. The one place that checks these numbers."""

from data_pipeline.core.errors import UserError


def check_streams(streams: int, rows_per_step: int) -> None:
    """Raise UserError when a step cannot take equally many rows of each stream."""
    if streams < 1 or rows_per_step < 1 or rows_per_step % streams:
        some = max(1, streams)
        raise UserError(
            f"data.rows_per_step is {rows_per_step} and data.streams {streams}; a step takes equally many rows of each"
            f" stream: make rows_per_step a multiple, e.g. {max(1, -(-rows_per_step // some)) * some}"
        )


def rank_streams(streams: int, rank: int, world_size: int) -> range:
    """Streams that the rank serves: those congruent to it modulo the number of ranks. Raises: UserError, as `check_ranks`."""
    check_ranks(streams, world_size)
    return range(rank, streams, world_size)


def check_ranks(streams: int, world_size: int) -> None:
    """Raise UserError, with the possible numbers, when so many ranks cannot share out the streams evenly."""
    if streams % world_size:
        usable = ", ".join(str(n) for n in range(1, streams + 1) if streams % n == 0)
        raise UserError(
            f"{world_size} ranks cannot share data.streams {streams} evenly; possible are {usable} (or train from the"
            " beginning with other streams, which fix the order of the data)"
        )


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
