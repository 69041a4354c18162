"""Kneser-Ney by the sorted arrays against the textbook's sums over dictionaries."""

from collections import Counter

import numpy as np
import pytest

from pretrain.evaluate.ngram import NGram

VOCABULARY = 12
DRAWN = np.random.default_rng(0)
WINDOWS = [DRAWN.choice(VOCABULARY - 2, p=np.arange(1, 11) / 55, size=n) for n in (1, 2, 40, 60, 3, 80)]


@pytest.fixture(scope="module")
def model() -> NGram:
    return NGram(WINDOWS, VOCABULARY, 3)


def textbook(context: tuple[int, ...], token: int, order: int) -> float:
    """p(token | context) of the highest order, and of its lower ones by how many tokens stand before."""
    grams = {
        n: Counter(tuple(w[i : i + n].tolist()) for w in WINDOWS for i in range(len(w) - n + 1)) for n in (1, 2, 3)
    }
    counts = {order: grams[order]}
    for n in range(1, order):
        preceded = Counter(gram[1:] for gram in grams[n + 1])
        counts[n] = Counter({gram: max(1, preceded[gram]) for gram in grams[n]})
    found = 1 / VOCABULARY
    for n in range(1, len(context) + 2):
        history = context[len(context) - n + 1 :]
        followers = {gram: count for gram, count in counts[n].items() if gram[:-1] == history}
        if not followers:
            break
        have = Counter(min(count, 4) for count in counts[n].values())
        have = {c: sum(1 for count in counts[n].values() if count == c) for c in (1, 2, 3, 4)}
        if min(have[1], have[2], have[3]) == 0:
            off = {1: 0.5, 2: 0.5, 3: 0.5}
        else:
            y = have[1] / (have[1] + 2 * have[2])
            off = {c: min(max(c - (c + 1) * y * have[c + 1] / have[c], 0), c - 0.01) for c in (1, 2, 3)}
        total = sum(followers.values())
        kept = sum(off[min(count, 3)] for count in followers.values())
        own = counts[n][(*history, token)] if (*history, token) in followers else 0
        found = (own - off[min(own, 3)] if own else 0) / total + kept / total * found
    return found


@pytest.mark.parametrize("context", [(), (3,), (9, 8), (5, 5), (0, 9), (11,), (11, 4), (10, 11)], ids=str)
def test_probabilities_are_the_textbooks_and_sum_to_one(model: NGram, context: tuple[int, ...]) -> None:
    found = [model.probability(context, token) for token in range(VOCABULARY)]
    assert sum(found) == pytest.approx(1, abs=1e-12)
    assert found == pytest.approx([textbook(context, token, 3) for token in range(VOCABULARY)], abs=1e-12)
    assert min(found) > 0  # what was never seen is possible


def test_nats_are_of_the_targets_given_all_before_them(model: NGram) -> None:
    expected = -np.log(model.probability([1, 2], 3)) - np.log(model.probability([2, 3], 4))
    assert model.nats([1, 2], [3, 4]) == pytest.approx(expected)


def test_samples_have_the_models_own_frequencies_and_are_a_function_of_the_seed(model: NGram) -> None:
    drawn = Counter(model.sample([9, 8], 1, seed)[0] for seed in range(4000))
    for token in range(VOCABULARY):
        p = model.probability([9, 8], token)
        assert abs(drawn[token] / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5 + 1e-3
    assert model.sample([1], 20, 5) == model.sample([1], 20, 5) != model.sample([1], 20, 6)


def test_what_has_structure_is_known_better_by_longer_n_grams() -> None:
    windows = [np.tile([1, 2, 3, 1, 2, 4], 30)]
    test = [1, 2, 3, 1, 2, 4] * 3
    nats = [NGram(windows, VOCABULARY, order).nats(test[:6], test[6:]) / 12 for order in (1, 2, 4)]
    assert nats[0] > nats[1] > nats[2]
    assert nats[2] < 0.15
