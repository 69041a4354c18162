"""Interpolated Kneser-Ney n-grams over token ids (Chen and Goodman 1999, modified discounts): what is there for the taking without a
network.

The n-grams of each order lie in sorted arrays, those of order k as numbers `parent * V + token` where the parent is the place of their
first k - 1 tokens: a trie, in which the followers of a context are neighbours. Windows are counted by themselves.

Shape letters: V vocabulary, K n-grams of one order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.core.keys import generator
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows

READ_ROWS = 256


@dataclass(frozen=True)
class Level:
    """The n-grams of one order.

    Attributes:
        keys_K: int64, sorted: parent * V + token.
        counts_K: how often each occurs, for the highest order; below, how many different tokens stand before it.
        starts: of the contexts one order lower, where their followers begin in keys_K; one more at the end.
        totals, kept: of each context: the sum of its followers' counts, and of their discounts.
        discounts: taken off a count of 1, 2, and 3 or more.
    """

    keys_K: np.ndarray
    counts_K: np.ndarray
    starts: np.ndarray
    totals: np.ndarray
    kept: np.ndarray
    discounts: np.ndarray


class NGram:
    """Probabilities of tokens given up to `order - 1` tokens before them."""

    def __init__(self, windows: Sequence[np.ndarray], vocab_size: int, order: int):
        self.vocab_size, self.order = vocab_size, order
        self.num_tokens = sum(map(len, windows))
        self.levels = _levels(windows, vocab_size, order)

    @classmethod
    def count(cls, data: str, manifest: Manifest, max_rows: int, order: int) -> "NGram":
        """Of the first `max_rows` rows of the training split. Raises: UserError."""
        rows = TokenRows(data, manifest, "train")
        windows: list[np.ndarray] = []
        left = max_rows
        for shard, info in enumerate(manifest.splits["train"]):
            for start in range(0, min(info.rows, left), READ_ROWS):
                stop = min(start + READ_ROWS, info.rows, start + left)
                tokens_BR, lengths = rows.read(Span(0, shard, start, stop))
                for row, row_lengths in zip(tokens_BR, lengths):
                    windows += np.split(
                        np.asarray(row, dtype=np.int64)[: int(np.sum(row_lengths))], np.cumsum(row_lengths)[:-1]
                    )
                left -= stop - start
            if left <= 0:
                break
        return cls(windows, manifest.tokenizer.vocab_size, order)

    def nats(self, context: Sequence[int], target: Sequence[int]) -> float:
        """-log p(target | context), exactly."""
        tokens = [*context, *target]
        total = 0.0
        for i in range(len(context), len(tokens)):
            total -= float(np.log(self.probability(tokens[max(0, i - self.order + 1) : i], tokens[i])))
        return total

    def probability(self, context: Sequence[int], token: int) -> float:
        """p(token | the last `order - 1` tokens of the context)."""
        found = 1 / self.vocab_size
        for level, place in self._contexts(context):
            found *= level.kept[place] / level.totals[place]
            start, stop = level.starts[place], level.starts[place + 1]
            wanted = place * self.vocab_size + token
            at = start + int(np.searchsorted(level.keys_K[start:stop], wanted))
            if at < stop and level.keys_K[at] == wanted:
                count = level.counts_K[at]
                found += (count - level.discounts[min(count, 3)]) / level.totals[place]
        return float(found)

    def sample(self, context: Sequence[int], length: int, seed: int) -> list[int]:
        """A continuation: the longest known context's followers with their discounted counts, or else what a shorter one gives."""
        drawn = generator(seed, "ngram")
        tokens = list(context)
        for _ in range(length):
            tokens.append(self._draw(tokens[max(0, len(tokens) - self.order + 1) :], drawn))
        return tokens[len(context) :]

    def _draw(self, context: Sequence[int], drawn: np.random.Generator) -> int:
        for level, place in reversed(list(self._contexts(context))):
            at = drawn.random() * level.totals[place]
            start, stop = level.starts[place], level.starts[place + 1]
            counts = level.counts_K[start:stop]
            cumulated = np.cumsum(counts - level.discounts[np.minimum(counts, 3)])
            if at < cumulated[-1]:
                return int(level.keys_K[start + int(np.searchsorted(cumulated, at, side="right"))] % self.vocab_size)
        return int(drawn.integers(self.vocab_size))

    def _contexts(self, context: Sequence[int]) -> list[tuple[Level, int]]:
        """Levels that know this context's end, and its place there, from the empty context to the longest known."""
        found: list[tuple[Level, int]] = []
        for length in range(min(len(context), self.order - 1) + 1):
            place = 0
            for depth, token in enumerate(context[len(context) - length :]):
                keys_K = self.levels[depth].keys_K
                wanted = place * self.vocab_size + token
                place = int(np.searchsorted(keys_K, wanted))
                if place == len(keys_K) or keys_K[place] != wanted:
                    return found
            level = self.levels[length]
            if level.totals[place] == 0:  # seen at the ends of windows alone
                return found
            found.append((level, place))
        return found


def _levels(windows: Sequence[np.ndarray], vocab_size: int, order: int) -> list[Level]:
    tokens_T = np.concatenate([*windows, np.zeros(0, dtype=np.int64)])
    ends_T = np.repeat(np.cumsum([len(window) for window in windows]), [len(window) for window in windows])
    places_T = np.zeros(len(tokens_T), dtype=np.int64)  # of the n-gram that begins at each token, in its order's array
    known: list[tuple[np.ndarray, np.ndarray]] = []
    suffixes: list[np.ndarray] = []
    begin_T = np.arange(len(tokens_T))
    for k in range(order):
        inside = begin_T + k < ends_T
        begin_T, ends_T, places_T = begin_T[inside], ends_T[inside], places_T[inside]
        keys = places_T * vocab_size + tokens_T[begin_T + k]
        keys_K, inverse, counts_K = np.unique(keys, return_inverse=True, return_counts=True)
        known.append((keys_K, counts_K))
        places_T = inverse.astype(np.int64)
        if k:  # of each n-gram, the place of what it is without its first token
            lower, parents = known[k - 1][0], keys_K // vocab_size
            before = suffixes[-1][parents] if k > 1 else np.zeros(len(parents), dtype=np.int64)
            suffixes.append(np.searchsorted(lower, before * vocab_size + keys_K % vocab_size))
    levels = []
    for k, (keys_K, counts_K) in enumerate(known):
        if k + 1 < order:
            preceded = np.bincount(suffixes[k], minlength=len(keys_K))
            # What begins windows alone has nothing before it and still occurs.
            counts_K = np.maximum(preceded, 1)
        num_contexts = 1 if k == 0 else len(known[k - 1][0])
        levels.append(_level(keys_K, counts_K.astype(np.int64), num_contexts, vocab_size))
    return levels


def _level(keys_K: np.ndarray, counts_K: np.ndarray, parents: int, vocab_size: int) -> Level:
    starts = np.searchsorted(keys_K, np.arange(parents + 1) * vocab_size)
    discounts = _discounts(counts_K)
    off_K = discounts[np.minimum(counts_K, 3)]
    parent_K = keys_K // vocab_size
    return Level(
        keys_K,
        counts_K,
        starts,
        np.bincount(parent_K, weights=counts_K, minlength=parents),
        np.bincount(parent_K, weights=off_K, minlength=parents),
        discounts,
    )


def _discounts(counts_K: np.ndarray) -> np.ndarray:
    """Chen and Goodman's, by count 0 to 3: from how many n-grams occur 1, 2, 3 and 4 times. Where these are too few, half a count."""
    n1, n2, n3, n4 = (int(np.sum(counts_K == count)) for count in range(1, 5))
    if min(n1, n2, n3) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.clip(found, 0.0, [0.0, 0.99, 1.99, 2.99])
