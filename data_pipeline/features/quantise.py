"""Scalar quantisers of a unit Gaussian, and how their digits and a token's gain are packed into bytes."""

import functools
import math

import torch

DIGITS_PER_BYTE = {2: 8, 3: 5, 4: 4, 6: 3, 16: 2, 256: 1}
# A scale is stored as a byte: 16 steps an octave from 2^-12 to 2^4. It is at most 2.2 % off, and no error comes of it:
# digits are taken after rounding it.
SCALE_STEPS, SCALE_ZERO = 16, 192
# 8-bit digits are uniform within +-8 spreads; 16-bit ones reach as far as any component can.
UNIFORM_LIMIT = 8.0


def codebook(levels: int, rank: int) -> torch.Tensor:
    """Reconstruction values, rising, of a quantiser for unit Gaussian values.

    Few levels: Lloyd-Max. 256 and 65536: uniform; one component of a token's whitened vector is at most sqrt(rank).
    """
    if levels <= 16:
        return lloyd_max(levels)
    limit = 1.03 * math.sqrt(rank)
    return torch.linspace(-1, 1, levels) * (limit if levels > 256 else min(limit, UNIFORM_LIMIT))


@functools.cache
def lloyd_max(levels: int) -> torch.Tensor:
    """The quantiser of least squared error for a unit Gaussian (Max 1960), by fixed-point iteration.

    Each value is the mean of the Gaussian between the midpoints to its neighbours.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    values = normal.icdf((torch.arange(levels, dtype=torch.float64) + 0.5) / levels)
    for _ in range(1000):
        inner = (values[1:] + values[:-1]) / 2
        edges = torch.cat([inner.new_tensor([-40.0]), inner, inner.new_tensor([40.0])])
        density, mass = normal.log_prob(edges).exp(), normal.cdf(edges)
        values = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
    return values.float()


def code_bytes(levels: int, count: int) -> int:
    """Bytes of `count` digits of `levels` levels."""
    return 2 * count if levels == 65536 else -(-count // DIGITS_PER_BYTE[levels])


def pack(digits_TK: torch.Tensor, levels: int) -> torch.Tensor:
    """Digits below `levels` [T, K] -> uint8 [T, bytes]: as many to a byte as fit, the first one lowest."""
    if levels == 65536:
        return torch.stack([digits_TK & 255, digits_TK >> 8], dim=2).flatten(1).to(torch.uint8)
    per_byte = DIGITS_PER_BYTE[levels]
    num_tokens, count = digits_TK.shape
    padded_TK = torch.nn.functional.pad(digits_TK, (0, -count % per_byte))
    powers = levels ** torch.arange(per_byte, device=digits_TK.device)
    return (padded_TK.view(num_tokens, -1, per_byte) * powers).sum(dim=2).to(torch.uint8)


def unpack(codes_TC: torch.Tensor, levels: int, count: int) -> torch.Tensor:
    """Inverse of `pack` -> int64 [T, count]. Corrupt bytes give wrong digits, none out of range."""
    codes_TC = codes_TC.long()
    if levels == 65536:
        return codes_TC[:, 0::2] + 256 * codes_TC[:, 1::2]
    powers = levels ** torch.arange(DIGITS_PER_BYTE[levels], device=codes_TC.device)
    return (codes_TC[:, :, None] // powers % levels).flatten(1)[:, :count]


def dequantise(codes_TC: torch.Tensor, levels: int, count: int, rank: int) -> torch.Tensor:
    """Packed digits [T, bytes] -> their reconstruction values [T, count]: a byte looks up all of its digits at once."""
    table = _byte_values(levels, rank, codes_TC.device)
    if levels == 65536:
        return table[unpack(codes_TC, levels, count)]
    return table[codes_TC.int()].flatten(1)[:, :count]


@functools.cache
def _byte_values(levels: int, rank: int, device: torch.device) -> torch.Tensor:
    """Values of all digits of every byte [256, digits] (of 65536 levels: of every digit), kept on the device."""
    book = codebook(levels, rank)
    if levels < 65536:
        book = book[unpack(torch.arange(256)[:, None], levels, DIGITS_PER_BYTE[levels])]
    return book.to(device)


def scale_codes(scales_T: torch.Tensor) -> torch.Tensor:
    """Positive scales -> the nearest of 256 logarithmic steps, uint8."""
    steps_T = scales_T.clamp_min(1e-30).log2() * SCALE_STEPS + SCALE_ZERO
    return steps_T.round().clamp(0, 255).to(torch.uint8)


def scale_values(codes_T: torch.Tensor) -> torch.Tensor:
    """Inverse of `scale_codes`, float32."""
    return torch.exp2((codes_T.float() - SCALE_ZERO) / SCALE_STEPS)
