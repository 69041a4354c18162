"""The measurements on generated text: each on texts whose answer is known."""

import math
from itertools import pairwise

import numpy as np
import pytest

from pretrain.config.sections import Diagnose
from pretrain.diagnose import text_checks
from pretrain.diagnose.texts import variety_figures, variety_verdicts


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
    assert text_checks.real_words(texts, {"a", "x"}).share == 0.25
    assert text_checks.copied(texts, {("a", "b", "c", "d", "e", "f")}).share == 0.5
    assert text_checks.real_words([], {"a"}).share is None
    assert text_checks.copied([["a"]], set()).share is None


def test_errors_of_shares_are_over_documents() -> None:
    """Of documents that are all words or none, the standard error is that of so many coins, however long they are."""
    half = text_checks.Shares([10, 0] * 8, [10] * 16)
    assert half.error == pytest.approx(0.5 / math.sqrt(15))
    assert math.isnan(text_checks.Shares([3], [4]).error)
    assert math.isnan(text_checks.Shares([3, 0], [4, 0]).error)
    assert text_checks.Shares([5] * 9, [10] * 9).error == 0
    assert half.excess_error(half) == 0  # what is the same in every document differs for certain
    assert half.excess_error(text_checks.Shares([0, 10] * 8, [10] * 16)) == pytest.approx(2 * half.error)


def test_the_error_by_halves_of_a_mean_is_its_standard_error() -> None:
    values = np.sin(np.arange(21))  # an odd number: the halves are 10 of 21
    expected = values.std(ddof=1) / math.sqrt(21)
    found = text_checks.halves_error(lambda chosen: float(values[chosen].mean()), 21, draws=4000)
    assert found == pytest.approx(expected, rel=0.05)
    assert math.isnan(text_checks.halves_error(lambda chosen: 1.0, 3))


def test_ratios_to_true_text_have_errors() -> None:
    truth = [[1, 2, 3, 4], [5, 6, 7, 8], [1, 3, 5, 7], [2, 4, 6, 8]]
    same = variety_figures(truth, truth)
    assert same["distinct_2_ratio"] == same["entropy_ratio"] == 1
    assert same["distinct_2_ratio_error"] == same["entropy_ratio_error"] == 0
    assert (
        variety_figures([[1, 1, 1, 1], [1, 2, 3, 4], [2, 2, 2, 2], [5, 6, 7, 8]], truth)["distinct_2_ratio_error"]
        > 0.05
    )
    (distinct, entropy) = variety_verdicts(same, Diagnose())
    assert distinct.figure == entropy.figure == "1.00 +- 0.00"


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
