"""Which numbers of ranks, rows and streams fit each other: said once, the same for configuration, loader and supervisor."""

import time
from collections import Counter

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.reading.order import Order
from data_pipeline.reading.streams import (
    OPEN_AHEAD_STEPS,
    check_micro_batch,
    check_streams,
    idle_share,
    largest_micro_batch,
    open_ahead,
    rank_lanes,
    rank_rows,
)

BIG = (192, 384)
"""Streams and rows a step of the shipped big configurations."""


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 40, 128, 192, 256, 384, 512, 1000, 1024, 16_384])
@pytest.mark.parametrize(("streams", "rows"), [BIG, (12, 24), (64, 512)])
def test_any_number_of_ranks_shares_out_a_step(world_size: int, streams: int, rows: int) -> None:
    shares = [rank_lanes(streams, rows, rank, world_size) for rank in range(world_size)]
    assert {sum(lane.num_rows for lane in share) for share in shares} == {rank_rows(rows, world_size)}
    given = [
        (lane.stream, lane.place + n)
        for share in shares
        for lane in share
        if lane.stream is not None
        for n in range(lane.num_rows)
    ]
    assert sorted(given) == [(stream, place) for stream in range(streams) for place in range(rows // streams)]
    filler = sum(lane.num_rows for share in shares for lane in share if lane.stream is None)
    assert filler / (filler + rows) == pytest.approx(idle_share(rows, world_size))


def test_streams_are_spread_over_as_few_ranks_as_can_be() -> None:
    assert [lane.stream for lane in rank_lanes(192, 192, 3, 64)] == [3, 67, 131]
    assert [lane.stream for lane in rank_lanes(192, 192, 39, 40)] == [39, 79, 119, 159, None]


@pytest.mark.parametrize("world_size", [5, 7, 40])
def test_ranks_that_divide_nothing_see_every_row_of_an_epoch_once(world_size: int) -> None:
    order = Order([6] * 24, 12, 24, seed=1)
    steps = 6  # two rows of a stream in each, of its twelve
    seen = [
        (span.shard, row)
        for rank in range(world_size)
        for lane in rank_lanes(12, 24, rank, world_size)
        for span in order.lane_spans(lane, 0, steps)
        for row in range(span.start, span.stop)
    ]
    assert sorted(seen) == [(shard, row) for shard in range(24) for row in range(6)]


def test_a_rank_of_many_costs_next_to_nothing() -> None:
    order = Order([1024] * 1920, *BIG, seed=1)
    started = time.process_time()
    for rank in (0, 191, 200, 16_383):
        for lane in rank_lanes(*BIG, rank, 16_384):
            order.lane_spans(lane, 10**7, 8)
    assert time.process_time() - started < 0.5


@pytest.mark.parametrize("shard_rows", [1024, 300])
@pytest.mark.parametrize("world_size", [1, 8, 40])
def test_what_is_opened_is_about_the_same_in_every_stretch_of_steps(shard_rows: int, world_size: int) -> None:
    """A simulation: all streams change shards in the same step; a shard counts when it is first asked for."""
    streams, rows = BIG
    stretch = shard_rows // 8
    opened = Counter()
    for lane in (lane for rank in range(world_size) for lane in rank_lanes(streams, rows, rank, world_size)):
        if lane.stream is not None:
            ahead = open_ahead(lane.stream, streams, shard_rows)
            assert min(OPEN_AHEAD_STEPS, shard_rows // 2) <= ahead < shard_rows
            opened.update((change * shard_rows - ahead) // stretch for change in range(2, 20))
    whole = [opened[n] for n in range(shard_rows // stretch * 2, shard_rows // stretch * 18)]
    assert max(whole) <= 1.5 * sum(whole) / len(whole)


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
