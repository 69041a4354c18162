"""A call's texts divided among the cores are the texts that each is by itself, in their order."""

import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from pretrain.serve.sampler import Abandoned, Draw, Sampler, Settings, parts_of
from tests.pretrain.serve.running import tiny_model

SETTINGS = Settings(4, 2.0, (0.0, 1.0), "euler", "training", 1.0)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draws(lengths: list[int]) -> list[Draw]:
    return [Draw((3, 4 + i), new, seed=i, choice=0, settings=SETTINGS, window=32) for i, new in enumerate(lengths)]


def test_parts_have_nearly_as_many_tokens_and_every_text_once() -> None:
    texts = draws([9, 1, 5, 5, 20, 3, 1])
    for num in (1, 2, 3, 10):
        parts = parts_of(texts, num)
        assert sorted(place for part in parts for place in part) == list(range(7))
        assert len(parts) == min(num, 7)
        tokens = [sum(texts[place].num_tokens for place in part) for part in parts]
        assert max(tokens) - min(tokens) <= max(text.num_tokens for text in texts)
    assert parts_of(texts[:1], 2) == [[0]]


def test_each_thread_draws_a_part_and_all_is_as_of_one_thread() -> None:
    texts, seen, threads = draws([9, 1, 5, 5, 3]), defaultdict(list), set()
    sampler = Sampler(tiny_model())

    def watch_of(place: int):  # type: ignore[no-untyped-def]
        def watch(step: int, t: float, tokens: list[int]) -> None:
            threads.add((threading.get_ident(), torch.get_num_threads()))
            seen[place].append(len(tokens))

        return watch

    found = sampler.draw(texts, [watch_of(place) for place in range(5)])
    assert [len(ids) for ids in found] == [9, 1, 5, 5, 3]
    assert dict(seen) == {i: [len(ids)] * 4 for i, ids in enumerate(found)}
    assert len(threads) == 2
    assert {number for _, number in threads} == {1}
    assert torch.get_num_threads() == 2
    model = tiny_model()
    for text, ids in zip(texts, found, strict=True):
        alone = model.generate([list(text.prompt)], text.num_new, 4, 2.0, seed=text.seed, eos_token_id=-1)
        assert ids == alone[0].tolist()
    torch.set_num_threads(1)
    assert sampler.draw(texts, [None] * 5) == found


def test_a_call_that_nobody_waits_for_ends_in_all_threads() -> None:
    steps: list[int] = []

    def abandoned() -> bool:
        steps.append(0)
        return True

    with pytest.raises(Abandoned):
        Sampler(tiny_model()).draw(draws([9, 9, 9]), [None] * 3, abandoned)
    assert 1 <= len(steps) <= 2  # each at its first step, where it got so far
    assert torch.get_num_threads() == 2
