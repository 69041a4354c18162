"""Keyed randomness is stable over processes and uniform."""

import numpy as np

from data_pipeline.core.keys import generator, hashes, key, permutation, uniforms


def test_keys_never_change() -> None:
    """Golden values: a change here would silently change the data order of every resumed run."""
    assert key(0, "shards", 3) == 60069054145506678
    assert permutation(6, "golden").tolist() == [2, 3, 0, 1, 4, 5]
    assert hashes(5, np.array([0, 1, 2])).tolist() == [7134611160154358618, 13877614986023876344, 4292726422858613063]
    assert uniforms(5, np.array([0])).tolist() == [0.386768045983934]
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()


def test_permutations_are_permutations() -> None:
    orders = [permutation(50, "p", number) for number in range(200)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert abs(np.mean([order[7] for order in orders]) - 24.5) < 4
    assert len({tuple(order.tolist()) for order in orders}) == 200


def test_parts_are_kept_apart() -> None:
    keys = {key("ab", "c"), key("a", "bc"), key("abc"), key(1, 2), key(12), key("1", 2), key("12"), key(-1), key(1)}
    assert len(keys) == 9


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    values = uniforms(key(0), np.arange(300)[:, None], np.arange(300))
    counts, _ = np.histogram(values, bins=20, range=(0, 1))
    assert abs(counts / values.size - 0.05).max() < 0.005
    assert abs(np.corrcoef(values[:-1].ravel(), values[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.02
    assert len(np.unique(values)) == values.size


def test_uniforms_do_not_depend_on_what_is_asked_beside_them() -> None:
    together = uniforms(key("t"), np.array([3, 8, 10**12]), np.array([0, 1, 2]))
    alone = [
        uniforms(key("t"), np.array([ticket]), np.array([place]))[0] for ticket, place in ((3, 0), (8, 1), (10**12, 2))
    ]
    assert together.tolist() == alone
