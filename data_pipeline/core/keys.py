"""Keyed randomness: every random number of a run is a pure function of named parts, never of a generator's history.

`key` and `generator` serve one draw at a time; `hashes` and `uniforms` serve whole arrays of rows or windows at once.
The values are part of the file formats and of every resumed run: changing a constant here changes what a seed means.
"""

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's increment: 2^64 over the golden ratio


def key(*parts: int | str) -> int:
    """64-bit key of the parts; the same on every machine and in every process (unlike Python's `hash`)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = (b"s" if isinstance(part, str) else b"i") + str(part).encode()
        digest.update(len(data).to_bytes(4, "little") + data)  # the length keeps ("ab", "c") and ("a", "bc") apart
    return int.from_bytes(digest.digest(), "little")


def generator(*parts: int | str) -> np.random.Generator:
    """A counter-based NumPy generator keyed by the parts. NumPy may change what its methods draw between versions;
    where the values belong to a format or to a run's order, use `permutation` and `uniforms`."""
    return np.random.Generator(np.random.Philox(key=key(*parts)))


def hashes(base: int, *indices: np.ndarray) -> np.ndarray:
    """uint64 hash of (base, index, index, ...) for arrays of non-negative integer indices that broadcast together."""
    state = np.full((1,), base, dtype=np.uint64)
    for index in indices:
        state = _mix(state + (np.asarray(index).astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return state


def uniforms(base: int, *indices: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) for each broadcast combination of the indices, from the upper 53 bits of `hashes`."""
    return (hashes(base, *indices) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(length: int, *parts: int | str) -> np.ndarray:
    """Keyed permutation of range(length), by sorting hashes: unlike NumPy's, the same in every NumPy version."""
    return np.argsort(hashes(key(*parts), np.arange(length)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), in place: every input bit flips every output bit with probability 1/2."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
