"""Attention over packed segments, bidirectional or causal: one public function, several kernels, no padding anywhere.

Shape letters: T packed tokens, H heads, K head dim, N segments.
"""

import functools
import importlib
import importlib.util
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("flash_attn", "torch_varlen", "sdpa")

# Consecutive segments shorter than this share one SDPA call, kept apart by a mask, as long as together they fit: a call costs
# about as much as attention over 128 tokens, so that 1,000 one-token segments are 8 calls, and the mask's zeros stay O(128 T).
_BLOCK_TOKENS = 128


@dataclass(frozen=True)
class Segments:
    """How the packed axis T is divided: tokens attend to the tokens of their own segment and to no others.

    Attributes:
        lengths: tokens per segment, each > 0, in packed order; they sum to T.
        device: where the derived tensors live.
        causal: tokens attend to none behind them.
    """

    lengths: tuple[int, ...]
    device: torch.device
    causal: bool = False

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str = "cpu", causal: bool = False
    ) -> "Segments":
        """Build from segment lengths; raises ValueError when one of them is not positive."""
        lengths = tuple(int(n) for n in lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segment lengths must be positive and at least one, found {lengths[:8]}")
        return cls(lengths, torch.device(device), causal)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Segments":
        """The same layout for another device; as accelerate's hooks call it, where a model is split over several."""
        device = torch.empty(0, device=device).device
        return self if device == self.device else Segments(self.lengths, device, self.causal)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @property
    def max_length(self) -> int:
        """Tokens of the longest segment."""
        return max(self.lengths)

    @functools.cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Int32 [N + 1] offsets of the segments, as variable-length kernels want them."""
        offsets = [0, *itertools.accumulate(self.lengths)]
        return self._on_device(torch.tensor(offsets, dtype=torch.int32))

    @functools.cached_property
    def positions_T(self) -> torch.Tensor:
        """Int64 [T]: each token's position in its segment, from 0."""
        lengths_N = torch.tensor(self.lengths)
        starts_N = torch.cumsum(lengths_N, 0) - lengths_N
        positions_T = torch.arange(self.num_tokens) - torch.repeat_interleave(starts_N, lengths_N)
        return self._on_device(positions_T)

    @functools.cached_property
    def ids_T(self) -> torch.Tensor:
        """Int64 [T]: the index of each token's segment."""
        return self._on_device(torch.repeat_interleave(torch.tensor(self.lengths)))

    @functools.cached_property
    def blocks(self) -> list[tuple[int, torch.Tensor | None]]:
        """(tokens, mask) of consecutive SDPA calls: one segment without a mask, or several short ones with one."""
        groups: list[list[int]] = []
        for length in self.lengths:
            if groups and sum(groups[-1]) + length <= _BLOCK_TOKENS:
                groups[-1].append(length)
            else:
                groups.append([length])
        return [(sum(group), self._block_mask(group)) for group in groups]

    def _block_mask(self, group: list[int]) -> torch.Tensor | None:
        if len(group) == 1:
            return None
        ids = self._on_device(torch.repeat_interleave(torch.tensor(group)))
        together = ids[:, None] == ids[None, :]
        return together.tril() if self.causal else together

    def _on_device(self, layout: torch.Tensor) -> torch.Tensor:
        """Copied without waiting for what the device computes: each micro-batch has a layout of its own."""
        return layout.to(self.device, non_blocking=True)


@torch.compiler.disable  # segment layouts change with every batch: what is compiled around it sees static shapes only
def varlen_attention(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments, implementation: str = "auto"
) -> torch.Tensor:
    """Softmax(q k^T / sqrt(K)) v within each segment, over all of its tokens, or if `segments.causal` over none behind.

    Args:
        q_THK, k_THK, v_THK: [T, H, K] of one dtype and device; `flash_attn` and `torch_varlen` want fp16 or bf16 on CUDA.
        segments: the division of T.
        implementation: one of `IMPLEMENTATIONS`, or "auto" for the fastest that runs here.

    Returns: [T, H, K].
    Raises: ValueError when the segments do not sum to T or the implementation is unknown or cannot run here.
    """
    if q_THK.shape[0] != segments.num_tokens:
        raise ValueError(f"segments sum to {segments.num_tokens} tokens, but q has {q_THK.shape[0]}")
    if implementation == "auto":
        implementation = choose_implementation(q_THK.device.type, q_THK.dtype)
    if implementation == "sdpa":
        return _sdpa(q_THK, k_THK, v_THK, segments)
    if implementation == "torch_varlen":
        return _torch_varlen(q_THK, k_THK, v_THK, segments)
    if implementation == "flash_attn":
        return _flash_attn(q_THK, k_THK, v_THK, segments)
    raise ValueError(f"unknown attention implementation {implementation!r}; expected auto or one of {IMPLEMENTATIONS}")


@functools.cache
def implementations(device_type: str, dtype: torch.dtype) -> list[str]:
    """Those of `IMPLEMENTATIONS` that run on this device in this dtype, the fastest first."""
    half = device_type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    if not half or torch.cuda.get_device_capability() < (8, 0):  # the other kernels begin with Ampere
        return ["sdpa"]
    runs = {
        "flash_attn": _flash_attention()[0] is not None,
        "torch_varlen": importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "sdpa": True,
    }
    return [name for name in IMPLEMENTATIONS if runs[name]]


@functools.cache
def choose_implementation(device_type: str, dtype: torch.dtype) -> str:
    """The fastest implementation for this device and dtype; logged once per combination."""
    choice = implementations(device_type, dtype)[0]
    logger.info("attention on %s in %s: %s", device_type, dtype, choice)
    return choice


def _sdpa(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments) -> torch.Tensor:
    dtype = q_THK.dtype
    if q_THK.device.type == "cpu" and dtype.itemsize < 4:  # float64 stays what it is
        # The CPU kernel's backward pass in bf16 takes 1.6 times its fp32 one (2.8 against 1.7 ms at 3 heads, 186 tokens).
        q_THK, k_THK, v_THK = q_THK.float(), k_THK.float(), v_THK.float()
    lengths = [tokens for tokens, _ in segments.blocks]
    # split, not slices: the backward of a split is one concatenation, that of N slices is N additions of a full [T, H, K].
    pieces = zip(q_THK.split(lengths), k_THK.split(lengths), v_THK.split(lengths), segments.blocks, strict=True)
    outputs = []
    for q, k, v, (_, mask) in pieces:
        q_1HLK, k_1HLK, v_1HLK = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out_1HLK = F.scaled_dot_product_attention(
            q_1HLK, k_1HLK, v_1HLK, attn_mask=mask, is_causal=segments.causal and mask is None
        )
        outputs.append(out_1HLK.squeeze(0).transpose(0, 1))
    return torch.cat(outputs).to(dtype)


def _torch_varlen(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = segments.cu_seqlens, segments.max_length
    window = (-1, 0) if segments.causal else (-1, -1)
    found = varlen_attn(q_THK, k_THK, v_THK, offsets, offsets, longest, longest, window_size=window)
    return found  # type: ignore[return-value]


@functools.cache
def _flash_attention() -> tuple[Callable[..., Any] | None, str]:
    """The function of FlashAttention 3 (Hopper alone) or 2, or None and why neither imports: one built for another torch does not."""
    reasons = []
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for name in ["flash_attn_interface"] * is_hopper + ["flash_attn"]:
        try:
            return importlib.import_module(name).flash_attn_varlen_func, ""
        except (AttributeError, ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    return None, "; ".join(reasons)


def _flash_attn(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments) -> torch.Tensor:
    function, why_not = _flash_attention()
    if function is None:
        raise ValueError(f"attention flash_attn is not to be had ({why_not}); pip install -e '.[cuda]'")
    offsets, longest = segments.cu_seqlens, segments.max_length
    out: Any = function(q_THK, k_THK, v_THK, offsets, offsets, longest, longest, causal=segments.causal)
    return out[0] if isinstance(out, tuple) else out
