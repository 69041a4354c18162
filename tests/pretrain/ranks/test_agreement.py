"""Ranks with other data or versions are refused before anything is built; the ranks here are threads."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from data_pipeline.core.errors import UserError
from pretrain.ranks.agreement import refuse_differences, versions

FACTS = {**versions(), "data.path": "a" * 64, "model.vae": "b" * 64}


def among(ranks: int) -> Callable[[Sequence[float]], list[float]]:
    """A sum over so many threads."""
    meeting, given, lock = threading.Barrier(ranks, timeout=30), [], threading.Lock()

    def all_reduce_sum(values: Sequence[float]) -> list[float]:
        with lock:
            given.append(list(values))
        meeting.wait()
        total = [float(sum(column)) for column in zip(*given, strict=True)]
        if meeting.wait() == 0:
            given.clear()
        meeting.wait()
        return total

    return all_reduce_sum


def said_by(facts: list[dict[str, str]]) -> list[str]:
    """What every rank is told, empty for nothing."""
    all_reduce_sum = among(len(facts))

    def start(rank: int) -> str:
        try:
            refuse_differences(facts[rank], f"node{rank}", rank, len(facts), all_reduce_sum)
        except UserError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(start, range(len(facts))))


def test_the_same_everywhere_is_no_mistake() -> None:
    assert said_by([FACTS] * 3) == [""] * 3
    assert said_by([FACTS]) == [""]


@pytest.mark.parametrize(("name", "value"), [("data.path", "c" * 64), ("torch", "0.1"), ("model.vae", "d" * 64)])
def test_a_host_with_something_else_is_named_on_every_rank(name: str, value: str) -> None:
    other = FACTS | {name: value}
    said = said_by([FACTS, FACTS, other, other])
    assert len(set(said)) == 1
    assert "rank 2 on node2 and 1 more would not train the same" in said[0]
    assert f"{name} is {value[:16]} there and {FACTS[name][:16]} on rank 0" in said[0]
    assert said[0].count(" there and ") == 1


def test_a_fact_that_only_one_has_and_more_than_there_is_room_for() -> None:
    assert "model.vae is nothing there" in said_by([FACTS, {k: v for k, v in FACTS.items() if k != "model.vae"}])[0]
    assert said_by([FACTS | {f"input {i}é": "x" * 64 for i in range(99)}] * 2) == ["", ""]
