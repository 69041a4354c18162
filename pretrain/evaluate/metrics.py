"""Figures of written texts, each with its interval over documents.

Words are lower-cased runs of letters and digits, and single other signs: what is compared over models must not depend on their tokenizers.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.diagnose.text_checks import ngrams
from pretrain.evaluate.bootstrap import Interval, mean, of_all, ratio_of_sums
from pretrain.evaluate.records import Record
from pretrain.evaluate.samples import Sample

WORD = re.compile(r"\w+|[^\w\s]")
REPEATED, COPIED = 4, 4
"""Words of a sequence that counts as repeated within its text, and as copied from its prompt."""
SLOW_RESAMPLINGS = 200


@dataclass(frozen=True)
class Judged:
    """What a metric sees."""

    samples: Sequence[Sample]
    records: Sequence[Record]

    def continuations(self) -> list[str]:
        """What the model wrote."""
        return [record.continuation for record in self.records]

    def references(self) -> list[str]:
        """What stood there."""
        return [sample.reference for sample in self.samples]


def words(text: str) -> list[str]:
    """Of a text."""
    return WORD.findall(text.lower())


def rouge(judged: Judged) -> dict[str, Interval]:
    """F-measures of ROUGE-1, -2 and -L by the package rouge-score, without stemming; 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    scorer = RougeScorer(list(names.values()), use_stemmer=False)
    found = [scorer.score(reference, text) for reference, text in zip(judged.references(), judged.continuations())]
    return {name: mean([scores[theirs].fmeasure for scores in found]) for name, theirs in names.items()}


def variety(judged: Judged) -> dict[str, Interval]:
    """distinct-1, -2 and -4 (different n-grams of all texts over all n-grams), and the entropy of words in nats."""
    texts = [words(text) for text in judged.continuations()]
    found = {f"distinct_{n}": _distinct(texts, n) for n in (1, 2, 4)}
    ids_G, documents_G = _numbered([list(ngrams(text, 1)) for text in texts])

    def entropy(counts_N: np.ndarray) -> float:
        weights = np.bincount(ids_G, weights=counts_N[documents_G]) if len(ids_G) else np.zeros(1)
        shares = weights[weights > 0] / max(weights.sum(), 1)
        return float(-(shares * np.log(shares)).sum())

    return found | {"entropy": of_all(entropy, len(texts), SLOW_RESAMPLINGS, within=(0, math.inf))}


def _distinct(texts: Sequence[Sequence[str]], n: int) -> Interval:
    ids_G, documents_G = _numbered([list(ngrams(text, n)) for text in texts])

    def share(counts_N: np.ndarray) -> float:
        weights_G = counts_N[documents_G]
        different = np.count_nonzero(np.bincount(ids_G, weights=weights_G)) if len(ids_G) else 0
        return different / max(weights_G.sum(), 1)

    return of_all(share, len(texts), SLOW_RESAMPLINGS, within=(0, 1))


def _numbered(grams: Sequence[Sequence[tuple[str, ...]]]) -> tuple[np.ndarray, np.ndarray]:
    """A number for each different one, and the document of each."""
    numbers: dict[tuple[str, ...], int] = {}
    ids = [numbers.setdefault(gram, len(numbers)) for of_text in grams for gram in of_text]
    documents = [place for place, of_text in enumerate(grams) for _ in of_text]
    return np.array(ids, dtype=np.int64), np.array(documents, dtype=np.int64)


def repetition(judged: Judged) -> dict[str, Interval]:
    """`repetition`: share of a text's four-word sequences that it had before. `copied_from_prompt`: that its prompt has."""
    repeated, copied = [], []
    for sample, record in zip(judged.samples, judged.records):
        grams = list(ngrams(words(record.continuation), REPEATED))
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        known = set(ngrams(words(sample.prompt), COPIED))
        copied.append(sum(gram in known for gram in grams) / len(grams) if grams else 0.0)
    return {"repetition": mean(repeated), "copied_from_prompt": mean(copied)}


def likelihood(judged: Judged) -> dict[str, Interval]:
    """`nats_per_token` of the references given their prompts, by the model's own tokenizer, and the same in bits per UTF-8 byte, which
    compares over tokenizers. Nothing of what has no probabilities.
    """
    nats = [record.nats for record in judged.records if record.nats is not None]
    if len(nats) < len(judged.records):
        return {}
    num_bytes = [len(sample.reference.encode()) for sample in judged.samples]
    return {
        "nats_per_token": ratio_of_sums(nats, [record.reference_tokens for record in judged.records]),
        "bits_per_byte": ratio_of_sums([value / math.log(2) for value in nats], num_bytes),
    }


def speed(judged: Judged) -> dict[str, Interval]:
    """`seconds` of writing a text, and new tokens a second; nothing of what was not written."""
    seconds = [record.seconds for record in judged.records]
    if not sum(seconds):
        return {}
    tokens = [record.tokens for record in judged.records]
    return {"seconds": mean(seconds), "tokens_per_second": ratio_of_sums(tokens, seconds)}


PLAIN: Sequence[Callable[[Judged], dict[str, Interval]]] = (rouge, variety, repetition, likelihood, speed)
"""Metrics that need nothing but the texts."""
