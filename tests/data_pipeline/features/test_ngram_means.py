"""The n-gram tables against plain loops, and what they must not do at a window's start."""

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.features.ngram_means import MIN_COUNT, SHRINKAGE, NgramMeans, ngram_keys


def test_keys_are_equal_exactly_for_equal_ngrams_within_windows():
    lengths = [4, 3, 5]
    tokens_T = torch.tensor([1, 2, 1, 2, 1, 2, 1, 0, 1, 2, 1, 2])
    contexts = []
    for start, length in zip([0, 4, 7], lengths):
        window = [None, None, *tokens_T[start : start + length].tolist()]
        contexts += [tuple(window[i : i + 3]) for i in range(length)]
    for n, keys_T in enumerate(ngram_keys(tokens_T, lengths, order=3, vocab_size=3), start=1):
        for i in range(12):
            for j in range(12):
                assert (keys_T[i] == keys_T[j]) == (contexts[i][-n:] == contexts[j][-n:])


def test_tables_hold_shrunken_means_of_frequent_ngrams():
    generator = torch.Generator().manual_seed(0)
    tokens_T = torch.randint(5, (400,), generator=generator)
    tokens_T[7] = 5  # once: too rare for an entry
    residuals_TF = torch.randn(400, 3, generator=generator)
    tables = NgramMeans.fit(residuals_TF, tokens_T, [100] * 4, order=1, vocab_size=6)
    predicted_TF = tables.predict(tokens_T, [100] * 4)
    assert MIN_COUNT > 1
    assert not predicted_TF[7].any()
    of_two = residuals_TF[tokens_T == 2]
    expected_F = of_two.sum(dim=0) / (len(of_two) + SHRINKAGE)
    torch.testing.assert_close(predicted_TF[tokens_T == 2][0], expected_F, rtol=2e-3, atol=1e-3)


def test_longer_ngrams_refine_shorter_ones():
    tokens_T = torch.randint(8, (4000,), generator=torch.Generator().manual_seed(0))
    previous_T = torch.cat([torch.zeros(1, dtype=torch.int64), tokens_T[:-1]])
    residuals_TF = torch.stack([tokens_T.float(), (tokens_T * previous_T).float()], dim=1)
    residuals_TF = residuals_TF - residuals_TF.mean(dim=0)
    left = [
        (residuals_TF - NgramMeans.fit(residuals_TF, tokens_T, [4000], n, 8).predict(tokens_T, [4000])).square().sum(0)
        for n in (1, 2)
    ]
    assert left[0][1] > 0.1 * residuals_TF.square().sum(0)[1]
    assert (left[1] < 0.02 * residuals_TF.square().sum(0)).all()


def test_no_tables_predict_nothing_and_too_long_keys_are_refused():
    assert NgramMeans(10, [], []).predict(torch.zeros(3, dtype=torch.int64), [3]) == 0.0
    with pytest.raises(UserError, match="exceed 64 bits"):
        list(ngram_keys(torch.zeros(3, dtype=torch.int64), [3], order=4, vocab_size=151_936))
