"""Attention over packed segments: every implementation that runs here against float64, and its speed.

    python -m benchmarks.attention
    python -m benchmarks.attention --device cuda --dtype bfloat16

`errors`: per implementation, head dimension and segment layout, the largest difference from float64 on the same inputs, over the
largest value: of the output, and of the three gradients together.
`tflops`: forward and backward, counted as FlashAttention's authors do: 4 K H FLOPs a pair of tokens in the forward pass, 2.5 times
that in the backward pass, which recomputes the scores. Pairs are those within segments.
`dense_over_packed`: time of one SDPA call over all T tokens with the block-diagonal mask, over that of ours.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.measuring import interleaved, print_figures
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import cli
from modeling.attention import Segments, implementations, varlen_attention

LAYOUTS: dict[str, list[int]] = {
    "one": [512],
    "single tokens": [1] * 64,
    "tiny": [1 + i % 3 for i in range(1000)],
    "ragged": [7, 1, 130, 1, 1, 64, 200, 3, 127, 1, 128, 129],
}
PASSES = 3.5

Tensors = Sequence[torch.Tensor]


def errors(
    implementation: str, lengths: list[int], head_dim: int, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Largest relative differences of output and gradients from float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), 2, head_dim)
    given = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]
    slope_THK = torch.randn(shape, generator=generator).to(device, dtype)
    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    q_THK, k_THK, v_THK = given
    found_THK = varlen_attention(q_THK, k_THK, v_THK, Segments.from_lengths(lengths, device), implementation)
    expected_THK = torch.cat([_softmax_attention(*parts) for parts in zip(*(x.split(lengths) for x in exact))])
    found = torch.autograd.grad(found_THK, given, slope_THK)
    expected = torch.autograd.grad(expected_THK, exact, slope_THK.cpu().double())
    return {
        "output": _difference([found_THK], [expected_THK]),
        "gradients": _difference(found, expected),
    }


def _softmax_attention(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor) -> torch.Tensor:
    scores_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) / q_THK.shape[-1] ** 0.5
    return torch.einsum("hts,shk->thk", scores_HTT.softmax(-1), v_THK)


def _difference(found: Tensors, expected: Tensors) -> float:
    # One scale for all: a lone token's weight is 1 whatever its query, whose gradient is exactly zero.
    scale = max(float(b.detach().abs().max()) for b in expected)
    return max(float((a.detach().cpu().double() - b.detach()).abs().max()) for a, b in zip(found, expected)) / scale


class Pass:
    """One forward and backward pass of an implementation, or of "dense"."""

    def __init__(
        self,
        implementation: str,
        lengths: list[int],
        heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.implementation, self.segments = implementation, Segments.from_lengths(lengths, device)
        shape = (sum(lengths), heads, head_dim)
        self.inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        self.slope_THK = torch.randn(shape, device=device, dtype=dtype)
        self.flops = PASSES * 4.0 * heads * head_dim * sum(n * n for n in lengths)
        ids_T = self.segments.ids_T
        self.mask_TT = ids_T[:, None] == ids_T[None, :] if implementation == "dense" else None

    def __call__(self) -> None:
        if self.mask_TT is None:
            q_THK, k_THK, v_THK = self.inputs
            out_THK = varlen_attention(q_THK, k_THK, v_THK, self.segments, self.implementation)
        else:
            q, k, v = (x.transpose(0, 1)[None] for x in self.inputs)
            out_THK = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask_TT)[0].transpose(0, 1)
        torch.autograd.grad(out_THK, self.inputs, self.slope_THK)
        if self.slope_THK.is_cuda:
            torch.cuda.synchronize()


def measure(
    device: torch.device, dtype: torch.dtype, head_dims: Sequence[int], width: int, lengths: list[int], repetitions: int
) -> dict[str, Any]:
    """`errors`, `tflops` and `dense_over_packed` of all implementations and head dimensions."""
    names = implementations(device.type, dtype)
    found: dict[str, Any] = {"errors": {}, "tflops": {}, "dense_over_packed": {}}
    for name, head_dim in itertools.product(names, head_dims):
        found["errors"][f"{name} {head_dim}"] = {
            layout: errors(name, layout_lengths, head_dim, device, dtype) for layout, layout_lengths in LAYOUTS.items()
        }
    for head_dim in head_dims:
        passes = {name: Pass(name, lengths, width // head_dim, head_dim, device, dtype) for name in [*names, "dense"]}
        contenders: dict[str, Callable[[], None]] = dict(passes)
        for one in contenders.values():
            one()
        spent = interleaved(contenders, repetitions, f"head dim {head_dim}")
        for name in names:
            found["tflops"][f"{name} {head_dim}"] = passes[name].flops / spent[name].wall_s / 1e12
        fastest = min(spent[name].wall_s for name in names)
        found["dense_over_packed"][str(head_dim)] = spent["dense"].wall_s / fastest
    return found


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description="Attention: exactness and speed."
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(bfloat16 on a GPU, else float32)")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], help="(%(default)s)")
    parser.add_argument("--width", type=int, default=768, help="heads times their dimension (%(default)s)")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 700, 324, 500, 300, 200, 24, 1024],
        help="segments (%(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=7, help="of each contender, in turn (%(default)s)")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    device = device_of(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    figures = measure(device, dtype, args.head_dims, args.width, args.lengths, args.repetitions)
    worst = max(part for layouts in figures["errors"].values() for row in layouts.values() for part in row.values())
    print_figures({"largest_error": worst, **figures, "device": str(device), "dtype": str(dtype)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
