"""The order of rows is a pure function of the step and covers every row once per epoch."""

import time

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import permutation
from data_pipeline.reading import order as order_module
from data_pipeline.reading.order import Order
from data_pipeline.reading.streams import Lane

SHARD_ROWS = [5, 3, 8, 1, 4, 7, 2]


def rows_of(order: Order, stream: int, steps: int) -> list[tuple[int, int, int]]:
    spans = [span for step in range(steps) for span in order.spans(stream, step)]
    return [(span.epoch, span.shard, row) for span in spans for row in range(span.start, span.stop)]


@pytest.mark.parametrize("rows_per_step", [3, 6, 21])
def test_each_epoch_of_a_stream_holds_each_of_its_rows_once(rows_per_step: int) -> None:
    order = Order(SHARD_ROWS, 3, rows_per_step, seed=1)
    for stream in range(3):
        own = {(shard, row) for shard in range(stream, 7, 3) for row in range(SHARD_ROWS[shard])}
        rows = rows_of(order, stream, 70)
        assert len(rows) == 70 * rows_per_step // 3
        for epoch in range(len(rows) // len(own)):
            part = rows[epoch * len(own) : (epoch + 1) * len(own)]
            assert {row[0] for row in part} == {epoch}
            assert {row[1:] for row in part} == own


def test_a_stream_reads_the_same_rows_whatever_the_step_size() -> None:
    assert rows_of(Order(SHARD_ROWS, 3, 3, 1), 1, 60) == rows_of(Order(SHARD_ROWS, 3, 12, 1), 1, 15)


def test_epochs_and_seeds_differ_in_shard_order() -> None:
    order = Order([2] * 40, 1, 1, seed=1)
    first, second = ([row[1] for row in rows_of(order, 0, 160)][i : i + 80] for i in (0, 80))
    assert first != second
    assert [row[1] for row in rows_of(Order([2] * 40, 1, 1, seed=2), 0, 80)] != first


def test_tickets_are_the_training_order() -> None:
    order = Order(SHARD_ROWS, 3, 6, seed=1)
    tickets = [
        ticket
        for step in range(4)
        for place in range(2)
        for ticket in (order.lane_tickets(Lane(s, 0, 2), step)[place] for s in range(3))
    ]
    assert tickets == list(range(24))


def test_an_epochs_order_is_drawn_once_though_the_next_ones_shards_are_asked_for_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple] = []
    monkeypatch.setattr(order_module, "permutation", lambda *key: drawn.append(key) or permutation(*key))
    order = Order([4] * 6, 2, 2, seed=1)
    for step in range(60):  # five epochs
        for stream in (0, 1):
            order.spans(stream, step + 7)
            order.spans(stream, step)
    assert len(drawn) == len(set(drawn)) == 2 * 6


def test_far_steps_cost_no_more_than_the_first() -> None:
    order = Order([1000] * 4000, 16, 64, seed=1)
    seconds = []
    for step in (0, 10**9):
        started = time.process_time()
        for stream in range(16):
            order.spans(stream, step)
        seconds.append(time.process_time() - started)
    assert seconds[1] < 10 * seconds[0] + 0.01


@pytest.mark.parametrize(
    ("rows", "streams", "rows_per_step", "named"),
    [([1, 1], 3, 3, "--shards 3"), ([1] * 4, 2, 5, "rows_per_step"), ([1, 0], 1, 1, "no rows"), ([1], 0, 1, "streams")],
)
def test_impossible_orders_are_refused(rows: list[int], streams: int, rows_per_step: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Order(rows, streams, rows_per_step, 0)
