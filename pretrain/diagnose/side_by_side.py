"""Batches measured side by side."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from data_pipeline.reading.batch import Batch

Result = TypeVar("Result")


def each(
    function: Callable[..., Result], batches: Sequence[Batch], *others: Sequence[Any], tick: Callable[[], None]
) -> list[Result]:
    """What the function makes of every batch (and of every other's item beside it), in order, without gradients.

    On CPUs as many batches at once as an operation has threads, each with one thread: a row's operations are too small to be shared, and
    results are as of one thread. On other devices one after the other. `tick` is called after each.
    """
    results = []
    for result in _in_order(torch.no_grad()(function), batches, *others):
        results.append(result)
        tick()
    return results


def _in_order(function: Callable[..., Result], batches: Sequence[Batch], *others: Sequence[Any]) -> Iterator[Result]:
    threads = torch.get_num_threads()
    if threads == 1 or len(batches) < 2 or batches[0].tokens_T.device.type != "cpu":
        yield from map(function, batches, *others)
        return
    torch.set_num_threads(1)  # of this thread and of those that begin now
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(function, batches, *others)
    finally:
        torch.set_num_threads(threads)
