"""What a model is judged on: documents of a text source, cut into a prompt and the true continuation, the reference.

The cut is keyed by the document's own text and falls between words, so that every model, whatever its tokenizer, is given the same
prompt, and a document is cut the same way wherever it stands and however many are drawn. TextLDM's paper cuts at a random 40-60 %.
"""

import hashlib
import heapq
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import hashes, key
from data_pipeline.text.sources import open_source

LEAST_WORDS = 8
"""Shorter documents leave nothing to continue."""
CUT = (0.4, 0.6)
POOL = 10
"""Of a long source, so many times the wanted documents are looked at, from its start."""
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Benchmark:
    """A text by a short name: its source, field of the text, and split, as `textldm prepare` takes them."""

    source: str
    text_field: str = "text"
    split: str | None = None


BENCHMARKS = {
    "wikipedia": Benchmark("wikimedia/wikipedia:20231101.en"),
    "wikisource": Benchmark("wikimedia/wikisource:20231201.en"),
    "tinystories": Benchmark("roneneldan/TinyStories", split="validation"),
    "lm1b": Benchmark("dvruette/lm1b", split="test"),
}
"""The paper's four sets, on the hub."""


@dataclass(frozen=True)
class Sample:
    """A prompt and its true continuation, which begins with the white space between them; `key` identifies the document."""

    key: str
    prompt: str
    reference: str


@dataclass(frozen=True)
class Drawn:
    """The samples, in the order of their keys, and what was looked at: documents in all, and those with too few words."""

    samples: list[Sample]
    documents: int
    too_short: int


def draw_samples(
    spec: str, count: int, seed: int, max_words: int, text_field: str | None = None, split: str | None = None
) -> Drawn:
    """The `count` documents with the lowest keyed hashes among the first `POOL * count`, each at most `max_words` long.

    Raises: UserError when there are fewer, or the source cannot be read.
    """
    named = BENCHMARKS.get(spec) if not Path(spec).exists() else None
    if named is None and not Path(spec).exists() and "/" not in spec and not Path(spec).suffix:
        raise UserError(
            f"--benchmark {spec}: no such file, and no benchmark of that name; expected {', '.join(BENCHMARKS)}, a file such as"
            " my.jsonl, or whatever textldm prepare --source takes"
        )
    source = open_source(
        named.source if named else spec,
        text_field or (named.text_field if named else "text"),
        split or (named.split if named else None),
    )
    return choose(islice(source, max(POOL * count, 1000)), spec, count, seed, max_words)


def choose(documents: Iterable[str], spec: str, count: int, seed: int, max_words: int) -> Drawn:
    """As `draw_samples`, of these documents; the same text twice counts once."""
    found: dict[str, str] = {}
    looked_at = too_short = 0
    for text in documents:
        looked_at += 1
        if len(WORD.findall(text)) < LEAST_WORDS:
            too_short += 1
            continue
        found.setdefault(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), text)
    if len(found) < count:
        few = f"{len(found)} different documents of at least {LEAST_WORDS} words among {looked_at}"
        remedy = f"ask for --samples {len(found)}, or give" if found else "give"
        raise UserError(f"--benchmark {spec} has {few}; expected {count}: {remedy} a longer text")
    chosen = heapq.nsmallest(count, found, key=lambda digest: (key(seed, "sample", digest), digest))
    return Drawn([cut(found[digest], digest, seed, max_words) for digest in chosen], looked_at, too_short)


def cut(text: str, digest: str, seed: int, max_words: int) -> Sample:
    """Its first `max_words` words, cut behind a share of them that is uniform in `CUT`."""
    ends = [match.end() for match in islice(WORD.finditer(text), max_words)]
    low, high = CUT
    uniform = float(hashes(key(seed, "cut", digest))[0] >> 11) * 2.0**-53
    words = min(max(round((low + (high - low) * uniform) * len(ends)), 1), len(ends) - 1)
    return Sample(digest[:16], text[: ends[words - 1]], text[ends[words - 1] : ends[-1]])
