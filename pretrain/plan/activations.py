"""What a forward and backward pass keeps and moves, by running it on the meta device: shapes are computed, nothing else.

A micro-batch's pass runs as it would anywhere, autograd included, and every storage that comes into being is counted until it goes.
So recomputation, the LM head's chunks and what a new layer saves are in the figure without a formula that somebody must keep true.
Attention alone is told: a kernel keeps queries, keys, values, its output and a number a query and head, whatever it is called.

Shape letters: T packed tokens, H heads, K head dim.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling import layers
from modeling.attention import Segments
from pretrain.stages.outline import Outline, Windows

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mm.out", "addmm_"}
FREE = {"view", "_unsafe_view", "t", "transpose", "split", "slice", "select", "expand", "unsqueeze", "squeeze", "detach", "alias",
        "as_strided", "unbind", "split_with_sizes", "permute", "empty", "empty_like", "new_empty"}  # fmt: skip
"""Operations that move nothing."""


@dataclass(frozen=True)
class Traced:
    """Of one micro-batch: most bytes alive at a time beyond weights and gradients, and bytes read and written outside matrix products."""

    peak_bytes: int
    moved_bytes: int


class StorageTracker(TorchDispatchMode):
    """Counts storages from their first tensor to their end, and what every operation reads and writes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = self.moved = 0
        self._seen: set[int] = set()
        self._kept = [
            tensor.untyped_storage() for tensor in known
        ]  # alive as long as we are, so that no number is used twice
        self._seen.update(id(storage) for storage in self._kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._meet(tensor)
        if name not in FREE and name not in PRODUCTS:
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in inputs + outputs)
        return result

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        number, size = id(storage), storage.nbytes()
        if number in self._seen:
            return
        self._seen.add(number)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, number, size).atexit = False

    def _gone(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.live -= size


class _Kernel(torch.autograd.Function):
    """Memory of an attention kernel over packed segments: its output, and the logarithm of each query's normaliser."""

    @staticmethod
    def forward(ctx, q_THK, k_THK, v_THK):  # type: ignore[no-untyped-def]
        out_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q_THK, k_THK, v_THK, out_THK, q_THK.new_empty(q_THK.shape[:2], dtype=torch.float32))
        return out_THK

    @staticmethod
    def backward(ctx, grad_THK):  # type: ignore[no-untyped-def]
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors[:3])


@contextmanager
def attention_kernel(copies_output: bool) -> Iterator[None]:
    """Within, attention on the meta device costs what a kernel does. `copies_output`: SDPA's pieces are put together once more."""
    original = layers.varlen_attention

    def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, segments: Segments, _: str = "auto") -> Tensor:
        out_THK = _Kernel.apply(q_THK, k_THK, v_THK)
        return out_THK.clone() if copies_output else out_THK

    layers.varlen_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        layers.varlen_attention = original


def trace(outline: Outline, windows: Windows, bf16: bool, checkpoint_every: int = 0, sdpa: bool = False) -> Traced:
    """Run a micro-batch of an outline on the meta device.

    Args:
        bf16: the trained model's parameters, as DeepSpeed makes them.
        checkpoint_every: recompute every n-th block in the backward pass; 0: none.
        sdpa: attention as on CPUs, piece by piece, instead of one kernel over all segments.
    """
    model = outline.trained.to(torch.bfloat16 if bf16 else torch.float32).train()
    set_recomputation(outline, checkpoint_every)
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.empty_like(p)
    kept = [*parameters, *(p.grad for p in parameters if p.grad is not None), *model.buffers()]
    kept += [tensor for module in outline.frozen for tensor in (*module.parameters(), *module.buffers())]
    tracker = StorageTracker(kept)
    with attention_kernel(copies_output=sdpa), tracker:
        outline.loss(windows).backward()
    return Traced(tracker.peak, tracker.moved)


def set_recomputation(outline: Outline, every: int) -> None:
    """Recompute every n-th block of all trained stacks; 0: none."""
    for module in outline.trained.modules():
        if isinstance(module, layers.Transformer):
            module.checkpoint_every = every
