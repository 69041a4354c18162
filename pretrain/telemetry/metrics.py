"""Metrics as (sum, weight): added up on the device, reduced over ranks, divided only in the end."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.ranks.distributed import all_reduce_sum


def reduce_metrics(totals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """(sum, weight) of this rank -> weighted means over all ranks, whose names must be the same. Collective."""
    names = sorted(totals)
    reduced = all_reduce_sum([number for name in names for number in totals[name]])
    pairs = zip(names, reduced[::2], reduced[1::2])
    return {name: total / weight for name, total, weight in pairs if weight}


class MetricSums:
    """Running (sum, weight) of named metrics, kept on the device in float64 until somebody asks."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums_M2: Tensor | None = None

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add a micro-batch's metrics: name -> (sum, weight), as a pair or as a tensor of two."""
        if not metrics:
            return
        names = sorted(metrics)
        pairs_M2 = torch.stack([_pair(name, metrics[name]) for name in names])
        if self._sums_M2 is None:
            self._names, self._sums_M2 = names, pairs_M2
        elif names != self._names:
            raise ValueError(f"a stage must always give the same metrics; found {names}, before {self._names}")
        else:
            self._sums_M2 = self._sums_M2 + pairs_M2

    def merge(self, other: "MetricSums") -> None:
        """Add another's sums."""
        if other._sums_M2 is not None:
            self.add(dict(zip(other._names, other._sums_M2)))

    def totals(self) -> dict[str, list[float]]:
        """The sums so far, on the host."""
        return {} if self._sums_M2 is None else dict(zip(self._names, self._sums_M2.tolist()))


def _pair(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        if value.shape != (2,):
            raise ValueError(f"metric {name} has shape {list(value.shape)}; expected a (sum, weight) pair, [2]")
        return value.detach().double()
    tensors = [part for part in value if isinstance(part, Tensor)]
    device = tensors[0].device if tensors else None
    return torch.stack([torch.as_tensor(part, device=device).detach().double() for part in value])
