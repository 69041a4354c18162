"""Which numbers of ranks, rows and streams fit each other: said once, the same for configuration, loader and supervisor."""

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.reading.streams import (
    check_micro_batch,
    check_ranks,
    check_streams,
    largest_micro_batch,
    rank_streams,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_all_streams_evenly(world_size: int) -> None:
    shares = [rank_streams(12, rank, world_size) for rank in range(world_size)]
    assert sorted(stream for share in shares for stream in share) == list(range(12))
    assert {len(share) for share in shares} == {12 // world_size}


@pytest.mark.parametrize("world_size", [3, 5, 8])
def test_ranks_that_cannot_are_told_which_can(world_size: int) -> None:
    for refuse in (lambda: check_ranks(4, world_size), lambda: rank_streams(4, 0, world_size)):
        with pytest.raises(
            UserError, match=f"{world_size} ranks cannot share data.streams 4 evenly; possible are 1, 2, 4"
        ):
            refuse()


@pytest.mark.parametrize(("streams", "rows", "better"), [(5, 192, 195), (4, 1, 4), (4, 0, 4), (0, 3, 3)])
def test_a_step_takes_equally_many_rows_of_each_stream(streams: int, rows: int, better: int) -> None:
    with pytest.raises(UserError, match=f"data.rows_per_step is {rows} and data.streams {streams}; .* e.g. {better}$"):
        check_streams(streams, rows)
    check_streams(max(1, streams), better)


def test_micro_batches_are_divisors_of_a_ranks_rows() -> None:
    for rows in range(1, 50):
        for at_most in range(1, 60):
            size = largest_micro_batch(rows, at_most)
            check_micro_batch(size, rows)
            assert not [n for n in range(size + 1, min(rows, at_most) + 1) if rows % n == 0]
    for size in (0, 5, 13):
        with pytest.raises(UserError, match="choose a divisor of 12"):
            check_micro_batch(size, 12)
