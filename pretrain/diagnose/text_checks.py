"""What `textldm diagnose` asks of generated text: is it text at all, does it vary as text does, is it copied? (docs/diagnosis.md)

Every figure stands beside the same figure of the true continuations, equally long and of the same documents: most of these have no
meaning by themselves.

Shape letters: T packed tokens, Z latent dim.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from data_pipeline.core.keys import generator
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.prompts import Prompt
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.detokenizer import Detokenizer
from pretrain.stages.dit import DiTStage
from pretrain.stages.samples import sample

WORD = re.compile(r"[^\W\d_]+")
COPY_WORDS = 6
"""Shortest word sequence that counts as copied: shorter ones are common phrases."""
READ_ROWS = 64
HALVES = 200


def guidance_sweep(
    stage: DiTStage,
    prompts: Sequence[Prompt],
    scales: Sequence[float],
    num_steps: int,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Check 7: rms of the latents (1 in the data) and distinct-2 of the tokens at each guidance scale, with second-order steps."""
    rows = []
    for scale in scales:
        found = sample(stage, prompts, scale, num_steps, "multistep", tick=tick)
        figures = {"latent_rms": rms(found.latents_NZ), "distinct_2": distinct(found.tokens, 2)}
        rows.append({"guidance_scale": scale, **figures})
    return rows


def rms(latents_TZ: Tensor) -> float:
    """Root mean square over all elements."""
    return latents_TZ.double().square().mean().sqrt().item()


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams among all n-grams of all texts (distinct-n)."""
    grams = Counter(gram for text in texts for gram in ngrams(text, n))
    return len(grams) / max(grams.total(), 1)


def entropy(texts: Sequence[Sequence[int]]) -> float:
    """Entropy in nats of the tokens' frequencies over all texts."""
    counts = Counter(token for text in texts for token in text)
    total = counts.total()
    return -sum(count / total * math.log(count / total) for count in counts.values())


def ngrams(text: Sequence, n: int) -> Iterator[tuple]:
    """All sequences of n neighbouring items, in order, repetitions included."""
    return (tuple(text[i : i + n]) for i in range(len(text) - n + 1))


def words(text: str, whole: bool = True) -> list[str]:
    """Lower-cased alphabetic runs; without those at the text's very ends, which may be parts of words, unless it is `whole`."""
    found = WORD.finditer(text.lower())
    length = len(text.lower())
    return [match[0] for match in found if whole or (match.start() > 0 and match.end() < length)]


@dataclass
class TrainingText:
    """What was found when the training text was read: its words, and which of the wanted word sequences it holds."""

    words: set[str]
    found: set[tuple[str, ...]]
    rows: int

    @classmethod
    def read(
        cls,
        folder: str,
        manifest: Manifest,
        detokenizer: Detokenizer,
        wanted: set[tuple[str, ...]],
        max_rows: int,
        tick: Callable[[int], None] = lambda rows: None,
        **options: Any,
    ) -> "TrainingText":
        """Read `max_rows` rows of the train split, in pieces spread evenly over it; keeps no n-gram that is not wanted.

        options: of `TokenRows`.
        """
        rows = TokenRows(folder, manifest, "train", **options)
        result = cls(set(), set(), 0)
        for span in spread_spans([shard.rows for shard in manifest.splits["train"]], max_rows):
            tokens_BR, lengths = rows.read(span)
            windows = [
                piece.tolist()
                for row, row_lengths in zip(tokens_BR, lengths)
                for piece in _split(row, row_lengths.tolist())
            ]
            for text in detokenizer.texts(windows):
                found = words(text, whole=False)  # a window may begin or end inside a word, and that is none
                result.words.update(found)
                if wanted:
                    result.found.update(wanted.intersection(ngrams(found, COPY_WORDS)))
            result.rows += span.stop - span.start
            tick(span.stop - span.start)
        return result


def spread_spans(shard_rows: Sequence[int], max_rows: int) -> list[Span]:
    """Spans of at most `READ_ROWS` rows with at most `max_rows` in all, evenly spaced over the shards; every row if there are no more."""
    spans = [
        Span(0, shard, start, min(start + READ_ROWS, rows))
        for shard, rows in enumerate(shard_rows)
        for start in range(0, rows, READ_ROWS)
    ]
    count = min(len(spans), -(-max_rows // READ_ROWS))
    chosen, left = [], max_rows
    for i in range(count):
        span = spans[i * len(spans) // count]
        chosen.append(span._replace(stop=min(span.stop, span.start + left)))
        left -= chosen[-1].stop - span.start
    return chosen


def _split(row, lengths: Sequence[int]) -> Iterator:  # type: ignore[no-untyped-def]
    start = 0
    for length in lengths:
        yield row[start : start + length]
        start += length


@dataclass(frozen=True)
class Shares:
    """Of every text, how many of its items there are (`counts`), and how many have what is asked for (`hits`)."""

    hits: list[int]
    counts: list[int]

    @property
    def share(self) -> float | None:
        """Over all texts; None if there is not one item."""
        return sum(self.hits) / sum(self.counts) if sum(self.counts) else None

    @property
    def error(self) -> float:
        """Standard error of the share over texts; nan of fewer than two with an item."""
        return standard_error(self._residuals())

    def excess_error(self, other: "Shares") -> float:
        """Standard error of this share minus that of other texts, one for each of these: a hard document is hard for both."""
        return standard_error([own - its for own, its in zip(self._residuals(), other._residuals(), strict=True)])

    def _residuals(self) -> list[float]:
        """What each text adds to the share's deviation from the truth, to first order."""
        share, total = self.share, sum(self.counts)
        if share is None or sum(count > 0 for count in self.counts) < 2:
            return [math.nan] * len(self.counts)
        return [(hit - share * count) / total for hit, count in zip(self.hits, self.counts)]


def standard_error(residuals: Sequence[float]) -> float:
    """Of a sum of independent contributions, by their deviations; nan of fewer than two."""
    count = len(residuals)
    return math.sqrt(math.fsum(residual**2 for residual in residuals) * count / (count - 1)) if count > 1 else math.nan


def halves_error(statistic: Callable[[np.ndarray], float], num_texts: int, draws: int = HALVES, seed: int = 0) -> float:
    """Standard error over texts of what is no mean, from its values on random halves of them; nan of fewer than four.

    Such figures change with the number of texts, and one that is drawn twice holds nothing new: distinct-n of a bootstrap is not distinct-n
    of so many texts. Halves, each text at most once, spread as all do (the delete-d jackknife with d = n/2, Shao and Wu 1989).

    Args:
        statistic: of the texts of these numbers, int64, rising.
    """
    if num_texts < 4:
        return math.nan
    drawn, half = generator(seed, "halves", num_texts), num_texts // 2
    found = [statistic(np.sort(drawn.permutation(num_texts)[:half])) for _ in range(draws)]
    return float(np.std(found, ddof=1)) * math.sqrt(half / (num_texts - half))


def copied(texts: Sequence[Sequence[str]], found: set[tuple[str, ...]]) -> Shares:
    """Check 9: of the texts' `COPY_WORDS`-word sequences, those that the training text holds."""
    grams = [list(ngrams(text, COPY_WORDS)) for text in texts]
    return Shares([sum(gram in found for gram in text) for text in grams], list(map(len, grams)))


def real_words(texts: Sequence[Sequence[str]], vocabulary: set[str]) -> Shares:
    """Check 8: of the texts' words, those that occur in the training text."""
    return Shares([sum(word in vocabulary for word in text) for text in texts], list(map(len, texts)))
