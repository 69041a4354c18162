"""Batches measured side by side."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from data_pipeline.core.threads import in_order
from data_pipeline.reading.batch import Batch

Result = TypeVar("Result")


def each(
    function: Callable[..., Result], batches: Sequence[Batch], *others: Sequence[Any], tick: Callable[[], None]
) -> list[Result]:
    """What the function makes of every batch (and of every other's item beside it), in order, without gradients.

    On CPUs several at once, as `in_order` says. `tick` is called after each.
    """
    results = []
    device = batches[0].tokens_T.device if batches else "cpu"
    for result in in_order(torch.no_grad()(function), batches, *others, device=device):
        results.append(result)
        tick()
    return results
