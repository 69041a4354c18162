"""Figures of made texts against the packages and against counting by hand."""

import math

import pytest
from rouge_score.rouge_scorer import RougeScorer

from pretrain.evaluate import metrics
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import Record
from pretrain.evaluate.samples import Sample

PAIRS = [
    ("the cat sat", " on the red mat today", " on a mat today today"),
    ("a dog ran", " over the hill and far away", " over over over over over the hill"),
    ("she said that", " it was late", " she said that it was late"),
]
SAMPLES = [Sample(str(i), prompt, reference) for i, (prompt, reference, _) in enumerate(PAIRS)]


def judged(nats: float | None = None, seconds: float = 0.0) -> Judged:
    records = [
        Record(str(i), text, len(text.split()), seconds * (i + 1), nats, 3 + i) for i, (_, _, text) in enumerate(PAIRS)
    ]
    return Judged(SAMPLES, records)


def test_rouge_is_the_packages() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    expected = [scorer.score(reference, text) for _, reference, text in PAIRS]
    found = metrics.rouge(judged())
    for name, theirs in {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}.items():
        assert found[name].value == pytest.approx(sum(e[theirs].fmeasure for e in expected) / 3, abs=1e-9)
        assert found[name].n == 3


def test_variety_counts_different_n_grams_of_all_texts() -> None:
    found = metrics.variety(judged())
    texts = [text.split() for _, _, text in PAIRS]
    for n in (1, 2, 4):
        grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        assert found[f"distinct_{n}"].value == pytest.approx(len(set(grams)) / len(grams))
    flat = [word for text in texts for word in text]
    shares = [flat.count(word) / len(flat) for word in set(flat)]
    assert found["entropy"].value == pytest.approx(-sum(p * math.log(p) for p in shares))


def test_repetition_is_within_a_text_and_copies_are_from_its_prompt() -> None:
    found = metrics.repetition(judged())
    assert found["repetition"].value == pytest.approx((0 + 1 / 4 + 0) / 3)  # over over over over, twice of four
    samples = [Sample("0", "x she said that it y", "")]
    records = [Record("0", "she said that it was she", 6, 0.0, None, 1)]
    assert metrics.repetition(Judged(samples, records))["copied_from_prompt"].value == pytest.approx(1 / 3)


def test_likelihoods_are_sums_over_sums_and_nothing_of_what_has_none() -> None:
    assert metrics.likelihood(judged()) == {}
    found = metrics.likelihood(judged(nats=6.0))
    assert found["nats_per_token"].value == pytest.approx(18 / (3 + 4 + 5))
    num_bytes = sum(len(reference.encode()) for _, reference, _ in PAIRS)
    assert found["bits_per_byte"].value == pytest.approx(18 / math.log(2) / num_bytes)


def test_speed_is_of_what_was_written() -> None:
    assert metrics.speed(judged()) == {}
    found = metrics.speed(judged(seconds=2.0))
    assert found["seconds"].value == pytest.approx(4.0)
    assert found["tokens_per_second"].value == pytest.approx((5 + 7 + 6) / 12)


def test_texts_without_words_have_figures() -> None:
    samples, records = [Sample("0", "a", "b")] * 5, [Record("0", "", 0, 0.0, None, 1)] * 5
    empty = Judged(samples, records)
    assert metrics.variety(empty)["distinct_2"].value == 0
    assert metrics.variety(empty)["entropy"].value == 0
    assert metrics.repetition(empty)["repetition"].value == 0
    assert metrics.rouge(empty)["rouge_1"].value == 0
