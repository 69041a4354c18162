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

from torch import Tensor

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


def copied_share(texts: Sequence[Sequence[str]], found: set[tuple[str, ...]]) -> float | None:
    """Check 9: share of the texts' `COPY_WORDS`-word sequences that the training text holds; None if they are too short for any."""
    grams = [gram for text in texts for gram in ngrams(text, COPY_WORDS)]
    return sum(gram in found for gram in grams) / len(grams) if grams else None


def real_word_share(texts: Sequence[Sequence[str]], vocabulary: set[str]) -> float | None:
    """Check 8: share of words that occur in the training text; None if there is not one word."""
    everything = [word for text in texts for word in text]
    return sum(word in vocabulary for word in everything) / len(everything) if everything else None
