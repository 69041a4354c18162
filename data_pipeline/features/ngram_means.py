"""What the tokens alone say about a teacher's features: the mean feature of each frequent n-gram.

The cache is read together with its tokens, so whatever a token and its neighbours determine need not be stored.
Tables of means for one, two and three tokens, each refining the shorter one, remove 60 to 90 % of the variance of a
small teacher's features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from data_pipeline.core.errors import UserError

MIN_COUNT = 3
"""Occurrences in the sample from which an n-gram gets an entry."""
SHRINKAGE = 2.0
"""A mean over c occurrences is scaled by c / (c + SHRINKAGE): rare n-grams lean on the shorter ones."""
MAX_ENTRIES = 32768
"""Per n; with 2,048 features an entry takes 4 KB of every rank's memory."""


@dataclass
class NgramMeans:
    """Sorted n-gram keys and the mean residual of each, for n = 1, 2, ...; the prediction is the sum over n."""

    vocab_size: int
    keys: list[torch.Tensor]
    """int64, sorted; one tensor per n."""
    means: list[torch.Tensor]
    """float16 [entries + 1, F]; the last row, for n-grams without an entry, is zero."""

    @property
    def order(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> "NgramMeans":
        return NgramMeans(self.vocab_size, [k.to(device) for k in self.keys], [m.to(device) for m in self.means])

    def predict(self, tokens_T: torch.Tensor, window_lengths: Sequence[int]) -> torch.Tensor | float:
        """Expected feature residual of every token -> float32 [T, F] (0.0 without tables)."""
        predicted_TF: torch.Tensor | float = 0.0
        for keys, means, keys_T in zip(
            self.keys, self.means, ngram_keys(tokens_T, window_lengths, self.order, self.vocab_size), strict=True
        ):
            predicted_TF = predicted_TF + means[_rows(keys, keys_T)].float()
        return predicted_TF

    @classmethod
    def fit(
        cls,
        residuals_TF: torch.Tensor,
        tokens_T: torch.Tensor,
        window_lengths: Sequence[int],
        order: int,
        vocab_size: int,
    ) -> "NgramMeans":
        """Tables for n = 1 .. order from centred features [T, F]."""
        tables = cls(vocab_size, [], [])
        for keys_T in ngram_keys(tokens_T, window_lengths, order, vocab_size):
            keys, counts = torch.unique(keys_T, return_counts=True)
            frequent = counts.topk(min(MAX_ENTRIES, len(counts))).indices.sort().values
            keys = keys[frequent][counts[frequent] >= MIN_COUNT]
            rows_T = _rows(keys, keys_T)
            sums = residuals_TF.new_zeros(len(keys) + 1, residuals_TF.shape[1]).index_add_(0, rows_T, residuals_TF)
            occurrences = torch.bincount(rows_T, minlength=len(keys) + 1)
            means = (sums / (occurrences + SHRINKAGE)[:, None]).half()
            means[-1] = 0
            residuals_TF = residuals_TF - means[rows_T]
            tables.keys.append(keys)
            tables.means.append(means)
        return tables


def ngram_keys(
    tokens_T: torch.Tensor, window_lengths: Sequence[int], order: int, vocab_size: int
) -> Iterator[torch.Tensor]:
    """Keys [T] of the 1-gram, 2-gram, ... `order`-gram ending at each token.

    A key is the n-gram read as a number in base vocab_size + 1; the digit `vocab_size` stands before a window's
    start, so that a window's first tokens have n-grams of their own.
    """
    if order and (vocab_size + 1) ** order > 2**63:
        raise UserError(
            f"n-grams of {order} tokens of a vocabulary of {vocab_size} exceed 64 bits; take a smaller order"
        )
    lengths_W = torch.as_tensor(window_lengths)
    if tokens_T.device.type == "cuda":  # from pageable memory, the host would wait for all that the device has to do
        lengths_W = lengths_W.pin_memory()
    lengths_W = lengths_W.to(tokens_T.device, non_blocking=True)
    starts_W = lengths_W.cumsum(0) - lengths_W
    index_T = torch.arange(len(tokens_T), device=tokens_T.device)
    positions_T = index_T - starts_W.repeat_interleave(lengths_W, output_size=len(tokens_T))
    keys_T = torch.zeros_like(tokens_T, dtype=torch.int64)
    for distance in range(order):
        earlier_T = tokens_T[(index_T - distance).clamp_min(0)]
        digits_T = torch.where(positions_T >= distance, earlier_T, vocab_size)
        keys_T = keys_T * (vocab_size + 1) + digits_T
        yield keys_T


def _rows(keys: torch.Tensor, keys_T: torch.Tensor) -> torch.Tensor:
    """Table row of each key; the row behind the last entry for keys without one."""
    if not len(keys):
        return torch.zeros_like(keys_T)
    rows_T = torch.searchsorted(keys, keys_T)
    found_T = keys[rows_T.clamp_max(len(keys) - 1)] == keys_T
    return torch.where(found_T, rows_T, len(keys))
