"""Attention over packed segments, bidirectional or causal: one public function, several kernels, no padding anywhere.

Shape letters: T packed tokens, H heads, K head dim, N segments.
"""

import functools
import importlib
import importlib.util
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

# What compiled code sees of a layout: offsets for a segment every so many tokens (a power of two times that, where there are more),
# and a bound of the longest segment, a power of two from here on. Empty segments and blocks behind a segment's end cost next to nothing.
_SLOT_TOKENS = 64
_BOUND_TOKENS = 1024


@dataclass(frozen=True)
class Segments:
    """How the packed axis T is divided: tokens attend to the tokens of their own segment and to no others.

    Attributes:
        lengths: tokens per segment, each > 0, in packed order; they sum to T.
        device: where the derived tensors live.
        causal: tokens attend to none that comes after them.
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

    @functools.cached_property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    @functools.cached_property
    def lengths_N(self) -> torch.Tensor:
        """Int64 [N]. All other layouts are made from it, on the device: it alone is copied, without waiting for what is computed there."""
        return self._on_device(torch.tensor(self.lengths))

    @functools.cached_property
    def cu_seqlens(self) -> torch.Tensor:
        """Int32 [N + 1] offsets of the segments, as variable-length kernels want them."""
        return F.pad(self.lengths_N.cumsum(0), (1, 0)).int()

    @functools.cached_property
    def positions_T(self) -> torch.Tensor:
        """Int64 [T]: each token's position in its segment, from 0."""
        starts_N = self.lengths_N.cumsum(0) - self.lengths_N
        return torch.arange(self.num_tokens, device=self.device) - self._of_tokens(starts_N)

    @functools.cached_property
    def ids_T(self) -> torch.Tensor:
        """Int64 [T]: the index of each token's segment."""
        return self._of_tokens(torch.arange(len(self.lengths), device=self.device))

    @functools.cached_property
    def for_kernels(self) -> tuple[torch.Tensor, int]:
        """`cu_seqlens`, behind the last one filled up with T, that is with empty segments, and a bound of the longest segment.

        How many offsets there are, and the bound, are compiled into a block: of the layouts of one T, nearly all have the same.
        """
        slots, segments = -(-self.num_tokens // _SLOT_TOKENS), len(self.lengths)
        while slots < segments:
            slots *= 2
        bound = max(_BOUND_TOKENS, 1 << (max(self.lengths) - 1).bit_length())
        return F.pad(self.cu_seqlens, (0, slots - segments), value=self.num_tokens), bound

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

    def _of_tokens(self, values_N: torch.Tensor) -> torch.Tensor:
        """Each token's segment's value; the device is not asked how many tokens there are."""
        return torch.repeat_interleave(values_N, self.lengths_N, output_size=self.num_tokens)

    def _on_device(self, layout: torch.Tensor) -> torch.Tensor:
        """Copied without waiting for what the device computes, which takes pinned memory: each micro-batch has a layout of its own."""
        return (
            layout.pin_memory().to(self.device, non_blocking=True)
            if self.device.type == "cuda"
            else layout.to(self.device)
        )


def varlen_attention(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments, implementation: str = "auto"
) -> torch.Tensor:
    """Softmax(q k^T / sqrt(K)) v within each segment, over all of its tokens, or if `segments.causal` over none that comes after.

    Args:
        q_THK, k_THK, v_THK: [T, H, K] of one dtype and device; `flash_attn` and `torch_varlen` want fp16 or bf16 on CUDA.
        segments: the division of T.
        implementation: one of `IMPLEMENTATIONS`, or "auto" for the fastest that runs here.

    Returns: [T, H, K].
    Raises: ValueError when the segments do not sum to T or the implementation is unknown or cannot run here.
    """
    if not torch.compiler.is_compiling():  # which would make a graph for each number of tokens that it is compared with
        check_tokens(q_THK, segments)
    if implementation == "auto":
        implementation = _chosen(q_THK.device.type, q_THK.dtype)
    if implementation == "sdpa":
        return _sdpa(q_THK, k_THK, v_THK, segments)
    if implementation == "torch_varlen":
        return _torch_varlen(q_THK, k_THK, v_THK, segments)
    if implementation == "flash_attn":
        return _flash_attn(q_THK, k_THK, v_THK, segments)
    raise ValueError(f"unknown attention implementation {implementation!r}; expected auto or one of {IMPLEMENTATIONS}")


def check_tokens(x_TD: torch.Tensor, segments: Segments) -> None:
    """Raise ValueError unless the segments divide the packed axis of x."""
    if x_TD.shape[0] != segments.num_tokens:
        raise ValueError(f"segments sum to {segments.num_tokens} tokens, but q has {x_TD.shape[0]}")


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
    kernels = _activate_torch_kernels() if choice == "torch_varlen" else ""
    logger.info("attention on %s in %s: %s%s", device_type, dtype, choice, kernels and f", {kernels}")
    return choice


@torch.compiler.assume_constant_result  # the compiler looks through caches
def _chosen(device_type: str, dtype: torch.dtype) -> str:
    return choose_implementation(device_type, dtype)


def _activate_torch_kernels() -> str:
    """Put newer kernels than torch's own FlashAttention 2 behind its operators, where a package has them; says which.

    FlashAttention 3 is for Hopper, 4 for Hopper and Blackwell.
    """
    from torch.nn.attention import activate_flash_attention_impl

    for name in {9: ("FA3", "FA4"), 10: ("FA4",)}.get(torch.cuda.get_device_capability()[0], ()):
        try:
            activate_flash_attention_impl(name)
        except (AttributeError, ImportError, OSError, RuntimeError, ValueError) as error:
            logger.info("%s is not to be had: %s", name, error)
        else:
            return name
    return "FA2"


@torch.compiler.disable  # a call for every few segments, which change with every batch: what is compiled around sees static shapes only
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

    offsets, bound = segments.for_kernels
    window = (-1, 0) if segments.causal else (-1, -1)
    found = varlen_attn(q_THK, k_THK, v_THK, offsets, offsets, bound, bound, window_size=window)
    return found  # type: ignore[return-value]


_flash_kernel: Any = None
"""What `_flash_attention` found, where the compiler can read it: it traces no imports, and looks through caches."""


@functools.cache
def _flash_attention() -> tuple[Callable[..., Any] | None, str]:
    """The function of FlashAttention 3 (Hopper alone) or 2, or None and why neither imports: one built for another torch does not."""
    global _flash_kernel
    reasons = []
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    for name in ["flash_attn_interface"] * is_hopper + ["flash_attn"]:
        try:
            _flash_kernel = importlib.import_module(name).flash_attn_varlen_func
            return _flash_kernel, ""
        except (AttributeError, ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    _flash_kernel = None
    return None, "; ".join(reasons)


def _flash_attn(q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, segments: Segments) -> torch.Tensor:
    if not torch.compiler.is_compiling():  # else it was asked for when the implementation was chosen
        why_not = _flash_attention()[1]
        if _flash_kernel is None:
            raise ValueError(
                f"attention flash_attn is not to be had ({why_not}); ./run.sh install takes it where a GPU is and it can be had"
            )
    offsets, bound = segments.for_kernels
    deterministic = torch.are_deterministic_algorithms_enabled()  # which is torch's own affair, and not the package's
    out: Any = _flash_kernel(
        q_THK, k_THK, v_THK, offsets, offsets, bound, bound, causal=segments.causal, deterministic=deterministic
    )
    return out[0] if isinstance(out, tuple) else out
