"""The same function of several things at once, a thread each."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def in_order(
    function: Callable[..., Result], *columns: Sequence[Any], device: torch.device | str = "cpu"
) -> Iterator[Result]:
    """What the function makes of the first of every column, of the second, and so on.

    On CPUs as many at once as an operation has threads, each with one thread: operations that take milliseconds are too small to be shared,
    and results are as of one thread. On other devices, and of a single thing, one after the other with all threads. What torch keeps for
    each thread (gradients, inference) is the function's own affair.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(columns[0]) < 2 or torch.device(device).type != "cpu":
        yield from map(function, *columns)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(function, *columns)
    finally:
        torch.set_num_threads(threads)  # which is also how many a thread has that begins later
