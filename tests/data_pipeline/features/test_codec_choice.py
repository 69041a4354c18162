"""Choosing a codec: the allocation is optimal for its model, the choice keeps its promise on unseen text."""

import itertools

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.features.codec_choice import (
    DISTORTION,
    Fidelity,
    Target,
    allocate,
    choose,
    directions,
    exact,
    fit,
    measure,
)
from data_pipeline.features.quantise import DIGITS_PER_BYTE, code_bytes
from tests.data_pipeline.features.test_codec import random_sample


@pytest.mark.parametrize("num_bytes", [1, 2, 5, 9, 20, 30, 64])
def test_allocation_fits_its_bytes_and_falls(num_bytes):
    variance_F = torch.logspace(0, -3, 40)
    levels = allocate(variance_F, num_bytes)
    assert levels == sorted(levels, reverse=True)
    assert len(levels) <= 40
    used = sum(code_bytes(group, len(list(run))) for group, run in itertools.groupby(levels))
    assert used <= num_bytes
    assert used >= min(num_bytes - 1, 38)  # only what no component can use is left


def test_allocation_is_near_the_best_of_all():
    """Against every allocation of whole bytes to groups, on a case that can be enumerated."""
    variance_F = torch.logspace(0, -2, 16)
    num_bytes = 6

    def error(levels: list[int]) -> float:
        padded = levels + [1] * (16 - len(levels))
        return sum(v * DISTORTION[level] for v, level in zip(variance_F.tolist(), padded))

    best = min(
        error(list(itertools.chain(*([level] * (n * DIGITS_PER_BYTE[level]) for level, n in zip(sizes, counts))))[:16])
        for sizes in [sorted(DIGITS_PER_BYTE, reverse=True)]
        for counts in itertools.product(range(num_bytes + 1), repeat=len(sizes))
        if sum(counts) == num_bytes
    )
    assert error(allocate(variance_F, num_bytes)) < 1.15 * best


def test_choice_keeps_its_promise_on_unseen_text():
    sample = random_sample(num_tokens=20_000)
    codec, fidelity, table = choose(sample, Target(0.99))
    assert fidelity.reaches(Target(0.99))
    assert fidelity in table
    assert measure(codec, random_sample(num_tokens=20_000, seed=1)).mean_cosine >= 0.989
    cheaper = [row for row in table if row.bits != "mixed" and row.reaches(Target(0.99))]
    assert cheaper
    assert all(fidelity.bytes_per_token <= row.bytes_per_token for row in cheaper)
    assert codec.ngrams.order >= 1  # the sample's features are mostly a function of the token
    assert len(str(fidelity)) == len(Fidelity.header())


def test_decoded_length_makes_up_for_what_the_codec_lost():
    """For a student that knows the tokens alone, the mean product with what is decoded is that with the exact directions; the mean
    cosine is not."""
    codec = choose(random_sample(num_tokens=20_000), Target(0.99))[0]
    held = random_sample(num_tokens=20_000, seed=1)
    coded = codec.encode(held.features_TF, held.tokens_T, held.window_lengths)
    decoded_TF = codec.decode(coded, held.tokens_T, held.window_lengths)
    knows_TF = directions(codec.mean_F + codec.ngrams.predict(held.tokens_T, held.window_lengths))
    exact, product, cosine = (
        float((knows_TF * other_TF).sum(1).double().mean())
        for other_TF in (directions(held.features_TF), decoded_TF, directions(decoded_TF))
    )
    assert abs(product / exact - 1) < 0.001
    assert cosine / exact - 1 > 0.005


def test_choice_weighs_the_tables_against_the_data():
    """For a data set of a few tokens, tables cost more than they save."""
    sample = random_sample(num_tokens=20_000)
    assert choose(sample, Target(0.99), num_tokens=10)[0].ngrams.order == 0


def test_a_collapsed_teacher_is_not_stored_as_its_mean():
    """Features that all but coincide have any cosine for free; what differs must be kept all the same."""
    sample = random_sample(num_tokens=20_000)
    sample.features_TF.add_(1000)
    assert choose(sample, Target(0.99, explained=0), ngram_orders=(0,))[1].bytes_per_token == 2
    kept = choose(sample, Target(0.99), ngram_orders=(0,))[1]
    assert kept.mean_cosine > 0.9999
    assert kept.explained >= 0.9
    with pytest.raises(UserError, match="expected shares below 1"):
        Target(1.5)


def test_plain_and_exact_codecs():
    sample = random_sample()
    codec, fidelity = fit(sample, rank=5, bits=4)
    assert (len(codec.levels), codec.num_code_bytes, fidelity.bits) == (5, 3, "4")
    assert fit(sample, rank=None, bits=16)[1].mean_cosine > 1 - 1e-8
    assert exact(sample, torch.float32)[1].mean_cosine == pytest.approx(1, abs=1e-12)


def test_impossible_wishes_are_refused():
    sample = random_sample()
    with pytest.raises(UserError, match="rank 25 with 4 bits: expected a rank of 1 to 24"):
        fit(sample, rank=25, bits=4)
    with pytest.raises(UserError, match="too small to fit a codec"):
        choose(random_sample(num_tokens=400))
    with pytest.raises(UserError, match=r"no codec reaches a mean cosine of 0\.9999999999"):
        choose(sample, Target(0.9999999999), ngram_orders=(0,))
