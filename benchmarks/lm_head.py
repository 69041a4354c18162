"""The LM head's loss in chunks beside the naive one, which keeps [T, V] logits: time and peak memory of forward and backward.

Shape letters: T packed tokens, D width, V vocabulary.
"""

import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measuring import interleaved
from data_pipeline.core.errors import UserError
from modeling.losses import linear_cross_entropy


class Head:
    """Random hidden states, weight and targets, and both losses on them."""

    def __init__(self, tokens: int, width: int, vocab_size: int, device: torch.device, dtype: torch.dtype):
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"generator": generator, "device": device}
        self.hidden_TD = torch.randn(tokens, width, **options).to(dtype).requires_grad_()
        self.weight_VD = (0.02 * torch.randn(vocab_size, width, **options)).to(dtype).requires_grad_()
        self.targets_T = torch.randint(vocab_size, (tokens,), **options)
        self.weights_T = torch.ones(tokens, device=device)

    def chunked(self) -> None:
        """Forward and backward of this project's loss."""
        loss, _ = linear_cross_entropy(self.hidden_TD, self.weight_VD, self.targets_T, self.weights_T)
        self._backward(loss)

    def naive(self) -> None:
        """Forward and backward of the naive loss: logits [T, V], then cross-entropy in fp32."""
        logits_TV = F.linear(self.hidden_TD, self.weight_VD)
        self._backward(F.cross_entropy(logits_TV.float(), self.targets_T, reduction="sum"))

    def liger(self) -> None:
        """Forward and backward of liger-kernel's loss (extra `cuda`): Triton kernels for the part between the matrix products."""
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss = liger_fused_linear_cross_entropy(self.hidden_TD, self.weight_VD, self.targets_T, reduction="sum")
        self._backward(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.hidden_TD.grad = self.weight_VD.grad = None
        if loss.is_cuda:
            torch.cuda.synchronize()

    def figures(self, repetitions: int) -> dict[str, float]:
        """`head_memory_ratio` and `head_time_ratio`, ours over the naive, and what they are made of.

        On GPUs with liger-kernel also ours over liger's: `head_memory_over_liger`, `head_time_over_liger`.
        """
        runs = {"chunked": self.chunked, "naive": self.naive}
        if self.hidden_TD.is_cuda and importlib.util.find_spec("liger_kernel"):
            runs["liger"] = self.liger
        for run in runs.values():
            run()  # compiles what it compiles
        peaks = {name: peak_bytes(run, self.hidden_TD.device) for name, run in runs.items()}
        if not peaks["naive"]:
            logits = (len(self.targets_T), len(self.weight_VD))
            raise UserError(
                f"logits of {logits} are too small to show in this process's size; expected megabytes: raise --head-tokens"
            )
        spent = interleaved(runs, repetitions, "LM head")
        liger = {}
        if "liger" in runs:
            liger["head_memory_over_liger"] = peaks["chunked"] / peaks["liger"]
            liger["head_time_over_liger"] = spent["chunked"].wall_s / spent["liger"].wall_s
        return {
            "head_memory_ratio": peaks["chunked"] / peaks["naive"],
            "head_time_ratio": spent["chunked"].wall_s / spent["naive"].wall_s,
            "head_time_ratio_cpu": spent["chunked"].cpu_s / spent["naive"].cpu_s,
            "head_peak_gb": peaks["chunked"] / 1e9,
            "head_naive_peak_gb": peaks["naive"] / 1e9,
            "head_s": spent["chunked"].wall_s,
            **liger,
        }


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds beyond what was held before: of the device, or of this process (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
