"""Documents drawn and cut: a function of their own text and the seed."""

import json
import random
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.evaluate.samples import choose, cut, draw_samples

DOCUMENTS = [" ".join(f"word{random.Random(i).randrange(999)}" for _ in range(20 + i % 90)) for i in range(300)]


def test_every_document_is_cut_between_words_at_40_to_60_percent() -> None:
    shares = []
    for sample in choose(DOCUMENTS, "x", 300, 0, 700).samples:
        text = sample.prompt + sample.reference
        assert text in DOCUMENTS
        assert sample.reference.startswith(" ")
        words = len(text.split())
        shares.append(len(sample.prompt.split()) / words)
        assert 0.4 - 0.5 / words <= shares[-1] <= 0.6 + 0.5 / words
    assert min(shares) < 0.45
    assert max(shares) > 0.55


def test_what_is_drawn_depends_neither_on_the_order_nor_on_copies_nor_on_other_documents() -> None:
    chosen = choose(DOCUMENTS, "x", 50, 3, 700).samples
    assert choose([*DOCUMENTS[::-1], *DOCUMENTS[:40]], "x", 50, 3, 700).samples == chosen
    assert choose(DOCUMENTS, "x", 20, 3, 700).samples == chosen[:20]
    assert choose(DOCUMENTS, "x", 50, 4, 700).samples != chosen
    alone = choose([chosen[7].prompt + chosen[7].reference], "x", 1, 3, 700).samples
    assert alone == [chosen[7]]


def test_long_documents_end_after_their_first_words_and_keep_their_own_white_space() -> None:
    text = "One\ttwo  three\n\nfour five six seven eight nine ten"
    sample = cut(text, "0" * 64, 0, 8)
    assert sample.prompt + sample.reference == "One\ttwo  three\n\nfour five six seven eight"


def test_too_short_documents_are_counted_and_too_few_refused_with_what_to_ask_for() -> None:
    drawn = choose([*DOCUMENTS[:30], "one word", "", "   "], "x", 30, 0, 700)
    assert (drawn.documents, drawn.too_short) == (33, 3)
    with pytest.raises(
        UserError, match="30 different documents of at least 8 words among 33; expected 31: ask for --samples 30"
    ):
        choose([*DOCUMENTS[:30], "one word", "", "   "], "x", 31, 0, 700)
    with pytest.raises(UserError, match="0 different documents"):
        choose([], "x", 1, 0, 700)


def test_a_misspelt_benchmark_and_a_field_without_text_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"wikipdeia: no such file.*expected wikipedia, wikisource, tinystories, lm1b"):
        draw_samples("wikipdeia", 1, 0, 700)
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"content": text}) + "\n" for text in DOCUMENTS[:5]))
    with pytest.raises(UserError, match="text"):
        draw_samples(str(file), 1, 0, 700)
    assert len(draw_samples(str(file), 5, 0, 700, text_field="content").samples) == 5
