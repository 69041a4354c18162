"""The LM head's loss in chunks beside the naive one, which keeps [T, V] logits: time and peak memory of forward and backward.

`python -m benchmarks.lm_head` prints the categorical head's loss in the same way, beside its own naive one and beside the LM head's loss in
chunks: `categorical_memory_ratio` (peak over the naive), `categorical_time_ratio` (over the LM head's loss), and with `through` in
their names the same with gradients through the mean latent.

Shape letters: T packed tokens, D width, V vocabulary, Z latent dim.
"""

import argparse
import ctypes
import gc
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measuring import interleaved, print_figures
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from modeling.heads import CategoricalHead
from modeling.losses import ClassScores, categorical_loss, linear_cross_entropy


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


class Categorical:
    """A categorical head's loss on random hidden states and statistics; compare with `Head` of the same sizes."""

    def __init__(
        self, tokens: int, width: int, vocab_size: int, latent_dim: int, device: torch.device, dtype: torch.dtype
    ):
        torch.manual_seed(0)
        head = CategoricalHead(width, latent_dim, vocab_size)
        torch.nn.init.normal_(head.means)
        head.within_variance.fill_(0.1)
        # What a head hands over, with its parameters as plain leaves.
        known = head._known(torch.randn(tokens, latent_dim), torch.rand(tokens, 1))
        self.hidden_TD = torch.randn(tokens, width).to(device, dtype).requires_grad_()
        self.weight_VD = (0.02 * torch.randn(vocab_size, width)).to(device, dtype).requires_grad_()
        self.scores = ClassScores(self.hidden_TD, self.weight_VD, *(x.to(device) for x in known))
        self.means_VZ = head.means.to(device)
        self.targets_T = torch.randint(vocab_size, (tokens,)).to(device)

    def chunked(self) -> None:
        """As it is trained by the cross-entropy alone."""
        loss, _, mean_TZ = categorical_loss(self.scores, self.means_VZ, self.targets_T)
        self._backward(loss + mean_TZ.square().sum())

    def through(self) -> None:
        """With gradients through the mean latent."""
        loss, _, mean_TZ = categorical_loss(self.scores, self.means_VZ, self.targets_T, through_mean=True)
        self._backward(loss + mean_TZ.square().sum())

    def naive(self) -> None:
        """Every logit, then cross-entropy and softmax in fp32."""
        logits_TV = F.linear(self.hidden_TD, self.weight_VD).float() + self.scores.known_ME @ self.scores.known_VE.T
        loss = F.cross_entropy(logits_TV, self.targets_T, reduction="sum")
        self._backward(loss + (logits_TV.softmax(-1) @ self.means_VZ).square().sum())

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        self.hidden_TD.grad = self.weight_VD.grad = None
        if loss.is_cuda:
            torch.cuda.synchronize()


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that a call holds beyond what was held before: of the device, or of this process (Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    # What was freed before and is still this process's would be taken first, and show nothing. musl has no such call.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is held now
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lm_head", description="Memory and time of the losses over the vocabulary."
    )
    parser.add_argument("--tokens", type=int, default=4096, help="(%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="(%(default)s)")
    parser.add_argument("--latent-dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, help="of the timed runs (%(default)s)")
    parser.add_argument("--no-naive", action="store_true", help="leave out the naive losses and the memory ratios")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    device = device_of(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = Head(args.tokens, args.width, args.vocab_size, device, dtype)
    categorical = Categorical(args.tokens, args.width, args.vocab_size, args.latent_dim, device, dtype)
    runs = {"head": head.chunked, "categorical": categorical.chunked, "categorical_through": categorical.through}
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    figures: dict[str, Any] = {f"{name}_peak_gb": peak / 1e9 for name, peak in peaks.items()}
    if not args.no_naive:
        naive = peak_bytes(categorical.naive, device)
        figures["categorical_naive_peak_gb"] = naive / 1e9
        figures |= {f"{name}_memory_ratio": peaks[name] / naive for name in ("categorical", "categorical_through")}
    spent = interleaved(runs, args.repetitions, "losses")
    for name in ("categorical", "categorical_through"):
        figures[f"{name}_time_ratio"] = spent[name].wall_s / spent["head"].wall_s
        figures[f"{name}_time_ratio_cpu"] = spent[name].cpu_s / spent["head"].cpu_s
    figures |= {f"{name}_s": spent[name].wall_s for name in runs}
    sizes = {name: getattr(args, name) for name in ("tokens", "width", "vocab_size", "latent_dim")}
    print_figures(figures | sizes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
