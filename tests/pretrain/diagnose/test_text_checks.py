"""The measurements on generated text: each on texts whose answer is known."""

import math
from itertools import pairwise

import pytest

from pretrain.diagnose import text_checks


def test_words_at_the_ends_of_a_continuation_are_not_counted() -> None:
    assert text_checks.words("ly the Dog ran hom", whole=False) == ["the", "dog", "ran"]
    assert text_checks.words(" the Dog's 12 b2b naïve_x home.", whole=False) == [
        "the",
        "dog",
        "s",
        "b",
        "b",
        "naïve",
        "x",
        "home",
    ]
    assert text_checks.words("ly home") == ["ly", "home"]
    assert text_checks.words("one", whole=False) == []


def test_shares_of_real_and_copied_words() -> None:
    texts = [["a", "b", "c", "d", "e", "f", "g"], ["x"]]
    assert text_checks.real_word_share(texts, {"a", "x"}) == 0.25
    assert text_checks.copied_share(texts, {("a", "b", "c", "d", "e", "f")}) == 0.5
    assert text_checks.real_word_share([], {"a"}) is None
    assert text_checks.copied_share([["a"]], set()) is None


def test_distinct_and_entropy() -> None:
    assert text_checks.distinct([[1, 2, 1, 2], [1, 2]], 2) == 0.5  # (1,2) three times, (2,1) once
    assert text_checks.distinct([[1]], 2) == 0
    assert text_checks.entropy([[1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert text_checks.entropy([[7, 7, 7]]) == 0


@pytest.mark.parametrize(
    ("shard_rows", "max_rows"), [([100, 70, 130], 1000), ([100, 70, 130], 64), ([500] * 20, 700), ([5], 3)]
)
def test_training_rows_are_read_from_the_whole_split(shard_rows: list[int], max_rows: int) -> None:
    spans = text_checks.spread_spans(shard_rows, max_rows)
    rows = [(span.shard, row) for span in spans for row in range(span.start, span.stop)]
    assert len(rows) == len(set(rows))
    assert all(row < shard_rows[shard] for shard, row in rows)
    assert len(rows) <= max_rows
    assert len(rows) >= min(sum(shard_rows), max_rows) - len(shard_rows) * text_checks.READ_ROWS
    if max_rows >= sum(shard_rows):
        assert len(rows) == sum(shard_rows)
    elif max_rows >= text_checks.READ_ROWS * 10:
        gaps = [later.shard - earlier.shard for earlier, later in pairwise(spans)]
        assert spans[-1].shard >= len(shard_rows) - 2
        assert max(gaps) <= 2
