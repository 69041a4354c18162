"""Transformer blocks of all models: pre-norm LayerNorm, RoPE, packed attention (bidirectional, causal where the segments say so), GELU MLP.

Shape letters: T packed tokens, D width, H heads, K head dim, P = K/2 rotary pairs, N segments.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import Segments, check_tokens, varlen_attention
from .shapes import check_heads


def rope_tables(positions_T: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864), fp32 [T, 1, K/2], for the rotate-half pairing (i, i + K/2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device) / head_dim
    angles_T1P = (positions_T[:, None].float() * theta**-exponents)[:, None, :]
    return angles_T1P.cos(), angles_T1P.sin()


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation is the gradient rotated back: autograd would keep and add up the halves one by one."""

    @staticmethod
    def forward(ctx, x_THK, cos_T1P, sin_T1P):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_T1P, sin_T1P)
        return _rotate(x_THK, cos_T1P, sin_T1P)

    @staticmethod
    def backward(ctx, grad_THK):  # type: ignore[no-untyped-def]
        cos_T1P, sin_T1P = ctx.saved_tensors
        return _rotate(grad_THK, cos_T1P, -sin_T1P), None, None


def _rotate(x_THK: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    first_THP, second_THP = x_THK.chunk(2, dim=-1)
    if torch.compiler.is_compiling():  # which fuses it, and refuses to write into a part of a tensor
        return torch.cat((first_THP * cos_T1P - second_THP * sin_T1P, second_THP * cos_T1P + first_THP * sin_T1P), -1)
    rotated_THK = torch.empty_like(x_THK, memory_format=torch.contiguous_format)
    left_THP, right_THP = rotated_THK.chunk(2, dim=-1)
    torch.mul(first_THP, cos_T1P, out=left_THP)
    torch.mul(second_THP, cos_T1P, out=right_THP)
    left_THP.addcmul_(second_THP, sin_T1P, value=-1)
    right_THP.addcmul_(first_THP, sin_T1P)
    return rotated_THK


def apply_rope(x_THK: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by their position; the tables are cast to x's dtype."""
    return _Rotation.apply(x_THK, cos_T1P.to(x_THK.dtype), sin_T1P.to(x_THK.dtype))


def hidden(linear: nn.Linear, matrices: int = 1) -> nn.Linear:
    """Mark a map between hidden states: its weight is `matrices` matrices on top of one another, which Muon treats one by one."""
    linear.matrices = matrices  # type: ignore[assignment]
    return linear


class KeepsStatistics(nn.Module):
    """A module whose buffers were measured: they stay in fp32 when `.to(dtype)`, `.half()` or `.bfloat16()` convert its parameters.

    Rounded, they would shift every latent. Who loads or stores a model in another dtype asks `statistics` for their names.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


def statistics(module: nn.Module) -> list[str]:
    """Names of all buffers below `module` that stay in fp32."""
    owners = [(path, owner) for path, owner in module.named_modules() if isinstance(owner, KeepsStatistics)]
    return [f"{path}.{name}".lstrip(".") for path, owner in owners for name, _ in owner.named_buffers(recurse=False)]


class Attention(nn.Module):
    """Multi-head self-attention within segments, optionally with per-head LayerNorm of queries and keys."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool = False):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = hidden(nn.Linear(width, 3 * width), matrices=3)
        self.out = hidden(nn.Linear(width, width))
        self.q_norm = nn.LayerNorm(head_dim, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, bias=False) if qk_norm else nn.Identity()

    def forward(self, x_TD: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], segments: Segments) -> torch.Tensor:
        q_THK, k_THK, v_THK = self.qkv(x_TD).view(x_TD.shape[0], 3, -1, self.head_dim).unbind(1)
        q_THK = apply_rope(self.q_norm(q_THK).to(v_THK.dtype), *rope)
        k_THK = apply_rope(self.k_norm(k_THK).to(v_THK.dtype), *rope)
        return self.out(varlen_attention(q_THK, k_THK, v_THK, segments).reshape(x_TD.shape[0], -1))


class Block(nn.Module):
    """Pre-norm Transformer block with 12 D^2 weights: attention 4 D^2, MLP 8 D^2.

    With `modulated`, six vectors per token (shift, scale and gate for each half) are added in from a conditioning vector, adaLN-Zero
    (DiT, arXiv 2212.09748): gates start at zero, so that every block starts as the identity.
    """

    def __init__(self, width: int, head_dim: int, qk_norm: bool = False, modulated: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.attention = Attention(width, head_dim, qk_norm)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=not modulated)
        self.mlp_in = hidden(nn.Linear(width, 4 * width))
        self.mlp_out = hidden(nn.Linear(4 * width, width))
        self.modulation = hidden(nn.Linear(width, 6 * width), matrices=6) if modulated else None

    def forward(
        self,
        x_TD: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
        condition_TD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.modulation is None:
            x_TD = x_TD + self.attention(self.attention_norm(x_TD), rope, segments)
            return x_TD + self._mlp(self.mlp_norm(x_TD))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(_given(condition_TD))).chunk(6, dim=-1)
        x_TD = x_TD + gate1 * self.attention(self.attention_norm(x_TD) * (1 + scale1) + shift1, rope, segments)
        return x_TD + gate2 * self._mlp(self.mlp_norm(x_TD) * (1 + scale2) + shift2)

    def _mlp(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(x_TD), approximate="tanh"))


def _given(condition_TD: torch.Tensor | None) -> torch.Tensor:
    if condition_TD is None:
        raise ValueError("a modulated block needs a conditioning vector per token")
    return condition_TD


class Gain(nn.Module):
    """x times a learned number per channel, none at the start."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return x_TD * self.weight


def time_embedding(time_T: torch.Tensor, width: int) -> torch.Tensor:
    """Sinusoidal embedding of t, fp32 [T, width], with frequencies from 1 to 1,000 radians over [0, 1]."""
    half = width // 2
    frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), half, device=time_T.device))
    angles = time_T.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Transformer(nn.Module):
    """A stack of blocks and a final LayerNorm over one packed axis.

    Attributes:
        checkpoint_every: recompute every n-th block's activations in the backward pass instead of keeping them; 0 keeps all.
        neighbour_heads: at the start, some heads of every block look at the token before and some at the token after.
    """

    def __init__(
        self,
        num_layers: int,
        width: int,
        head_dim: int,
        rope_theta: float,
        qk_norm: bool = False,
        modulated: bool = False,
        neighbour_heads: bool = False,
    ):
        super().__init__()
        check_heads(width, head_dim)
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.checkpoint_every = 0
        self.neighbour_heads = neighbour_heads
        self.blocks = nn.ModuleList(Block(width, head_dim, qk_norm, modulated) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_TD: torch.Tensor, segments: Segments, condition_TD: torch.Tensor | None = None) -> torch.Tensor:
        """[T, D] -> [T, D], after the final norm. Positions restart at 0 in every segment."""
        check_tokens(x_TD, segments)
        if x_TD.is_cuda:
            _ = segments.for_kernels  # made here: a compiled block would be one for the lengths it was made of
        rope = rope_tables(segments.positions_T, self.head_dim, self.rope_theta)
        for i, block in enumerate(self.blocks):
            if self.training and self.checkpoint_every and i % self.checkpoint_every == 0:
                x_TD = checkpoint(block, x_TD, rope, segments, condition_TD, use_reentrant=False)
            else:
                x_TD = block(x_TD, rope, segments, condition_TD)
        return self.norm(x_TD)


@contextmanager
def whole(*parameters: torch.Tensor) -> Iterator[None]:
    """Within, all values of these parameters are there to be read and written.

    They always are, but where a rank holds a piece of each alone, which then says itself how it is made whole: by an attribute `whole`,
    a function that gives a context manager (pretrain/engine/pieces.py). All ranks must come by, and what rank 0 has written is kept.
    """
    with ExitStack() as stack:
        for p in parameters:
            if hasattr(p, "whole"):
                stack.enter_context(p.whole())
        yield


def initialize(module: nn.Module) -> None:
    """Set every weight below `module`; the only place where weights are initialised.

    | weight                                          | initial value                                        |
    |-------------------------------------------------|------------------------------------------------------|
    | Linear with n inputs                            | N(0, 1 / (3 n)): GPT-2's 0.02 at its width, 768, and |
    |                                                 | neither too timid below nor too loud above           |
    | Attention.out, Block.mlp_out of an L-layer stack| the same over 2 L, so that the residual stream's     |
    |                                                 | variance does not grow with depth (GPT-2)            |
    | Block.modulation                                | 0 (adaLN-Zero)                                       |
    | Embedding                                       | N(0, 0.02^2)                                         |
    | LayerNorm                                       | weight 1, bias 0                                     |
    | every Linear's bias, Gain                       | 0                                                    |
    | Attention.qkv of a stack's neighbour heads      | `look_at`: a quarter of the heads (at least one) at  |
    |                                                 | offset -1, as many at +1                             |
    | Linear with attribute `zero_init`               | 0: the DiT's output head and the VAE's log-variance  |
    | Linear with attribute `zero_inputs`, a number   | as any other, but 0 for so many first inputs: z_t    |
    |                                                 | beside an estimate of z                              |

    Where all of them are on the meta device, which has no values, nothing is done: each draw there takes milliseconds.

    Raises: TypeError for a module with direct parameters that the table does not name.
    """
    if all(p.is_meta for p in module.parameters()):
        return
    for child in module.modules():
        with whole(*child.parameters(recurse=False)):
            _initialize_own(child)
    for stack in module.modules():
        if isinstance(stack, Transformer):
            for block in stack.blocks:
                assert isinstance(block, Block)
                _initialize_in_stack(block, stack)


def _initialize_own(child: nn.Module) -> None:
    """What is the same wherever a layer stands."""
    if isinstance(child, nn.Linear):
        std = 0.0 if getattr(child, "zero_init", False) else linear_std(child)
        nn.init.normal_(child.weight, std=std)
        if getattr(child, "zero_inputs", 0):
            with torch.no_grad():
                child.weight[:, : child.zero_inputs] = 0
        if child.bias is not None:
            nn.init.zeros_(child.bias)
    elif isinstance(child, nn.Embedding):
        nn.init.normal_(child.weight, std=0.02)
    elif isinstance(child, nn.LayerNorm):
        if child.weight is not None:
            nn.init.ones_(child.weight)
        if child.bias is not None:
            nn.init.zeros_(child.bias)
    elif isinstance(child, Gain):
        nn.init.zeros_(child.weight)
    elif any(True for _ in child.parameters(recurse=False)):
        raise TypeError(f"initialize() has no rule for the parameters of {type(child).__name__}")


def _initialize_in_stack(block: Block, stack: Transformer) -> None:
    """What a block has otherwise, as one of a stack."""
    for last in (block.attention.out, block.mlp_out):
        with whole(last.weight):
            nn.init.normal_(last.weight, std=linear_std(last) / math.sqrt(2 * len(stack.blocks)))
    if block.modulation is not None:
        with whole(block.modulation.weight):
            nn.init.zeros_(block.modulation.weight)
    if stack.neighbour_heads:
        qkv = block.attention.qkv
        heads = qkv.in_features // stack.head_dim
        share = max(1, heads // 4)
        with whole(qkv.weight, qkv.bias):
            look_at(block.attention, -1, range(share), stack.rope_theta)
            look_at(block.attention, 1, range(share, min(2 * share, heads)), stack.rope_theta)


def linear_std(linear: nn.Linear) -> float:
    """Standard deviation of a Linear's initial weights: 1 / sqrt(3 n) for n inputs."""
    return 1 / math.sqrt(3 * linear.in_features)


NEIGHBOUR_LOGIT = 12.0
NEIGHBOUR_FREQUENCIES = 5


@torch.no_grad()
def look_at(attention: Attention, offset: int, heads: range, rope_theta: float) -> None:
    """Set queries and keys to constants by which `heads` attend to the token `offset` places on, until training knows better.

    RoPE turns constant queries a and keys a exp(-i w offset) into logits that depend on the distance alone, a sum of
    a^2 cos(w (distance - offset)); over the highest frequencies w it has one peak, of height `NEIGHBOUR_LOGIT`. Without it a network
    first has to find out that neighbours matter, on a plateau that takes longer than a small run lasts.
    """
    half = attention.head_dim // 2
    top = slice(0, min(NEIGHBOUR_FREQUENCIES, half))
    angles = offset * rope_theta ** -(torch.arange(half, device=attention.qkv.bias.device)[top] / half)
    amplitude = math.sqrt(NEIGHBOUR_LOGIT * math.sqrt(attention.head_dim) / len(angles))
    query_HK, key_HK, _ = attention.qkv.bias.view(3, -1, attention.head_dim)
    weights_3HKD = attention.qkv.weight.view(3, -1, attention.head_dim, attention.qkv.in_features)
    for head in heads:
        weights_3HKD[:2, head] = 0
        query_HK[head, top] = amplitude
        key_HK[head, top] = amplitude * angles.cos()
        key_HK[head, half:][top] = -amplitude * angles.sin()
