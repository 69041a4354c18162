"""Texts beyond a window, block by block, and what the randomness of each block is drawn from.

Shape letters: T tokens of a text.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from .prompts import each, several

SEEDS = 2**64
BLOCK_STRIDE = 0x9E3779B97F4A7C15
"""Between the keys of a text's blocks: odd and far from those between seeds and places."""
Tokens = TypeVar("Tokens", torch.Tensor, list[int])
"""Of one text."""


def block_sizes(context: int, new: int, window: int, block: int | None = None) -> list[int]:
    """Tokens of the blocks in which `new` tokens are drawn or measured behind a context: one where all fits into a window.

    A block is half a window long unless it is said; with the latest tokens before it, it fills a window.
    """
    if block is None:
        block = new if context + new <= window else max(1, window // 2)
    return [min(block, new - start) for start in range(0, new, block)]


def latest(before_T: Tokens, size: int, window: int) -> Tokens:
    """The context of a block of `size` tokens: as many of those before it as a window holds beside it."""
    return before_T[max(0, len(before_T) - (window - size)) :]


def keyed_generator(seed: int, index: int, block: int = 0) -> torch.Generator:
    """The generator of a block's random numbers: of prompt `index` with `seed`. Raises: ValueError."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed is {seed}; expected 0 to {SEEDS - 1}, that is 2^64 - 1")
    return torch.Generator().manual_seed(noise_key(seed, index, block))


def noise_key(seed: int, index: int, block: int = 0) -> int:
    """What that generator starts from, below 2^64."""
    return (seed * 1_000_003 + index + block * BLOCK_STRIDE) % SEEDS


def sequence_keys(seed: int | Sequence[int], num: int, copies: int = 1) -> list[tuple[int, int]]:
    """What the noise of each sequence is drawn from: a common seed and its place, or its text's own seed, which is as if it were alone."""
    own = repeated(each("seed", seed, num), copies)
    return [(one, i % copies if several(seed) else i) for i, one in enumerate(own)]


def repeated(values: Sequence[Any], copies: int) -> list[Any]:
    """Each value so often, one after the other."""
    return [value for value in values for _ in range(copies)]
