"""Spill chunks: documents on their way from the encoding pass to the shards, sorted by hash so that any range of hashes
is one read.

Layout, little-endian: int64 [4] (magic, documents, tokens, bytes per token), then per document the upper and the lower
half of its hash (uint64 each), the end of its tokens and how many of them are its context (int64 each), then the tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write

_MAGIC = 0x324C4C4950534C54  # "TLSPILL2"
_HEADER = np.dtype([("magic", "<i8"), ("documents", "<i8"), ("tokens", "<i8"), ("token_bytes", "<i8")])


class Documents(NamedTuple):
    """Documents in the order of their hashes; document i holds tokens[ends[i-1] : ends[i]]."""

    hashes: np.ndarray  # uint64 [documents, 2]
    ends: np.ndarray  # int64 [documents]
    contexts: np.ndarray  # int64 [documents]: the first tokens that are the document's context; 0 but in pairs
    tokens: np.ndarray

    def lengths(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.ends, prepend=0)


def write_chunk(
    path: Path, hashes: np.ndarray, documents: Sequence[np.ndarray], dtype: str, contexts: Sequence[int]
) -> None:
    """Write documents, in any order, as a chunk; atomic."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    ends = np.cumsum([len(documents[i]) for i in order], dtype=np.int64)
    counts = np.array(contexts, np.int64)[order]
    header = np.array((_MAGIC, len(documents), ends[-1], np.dtype(dtype).itemsize), _HEADER)
    with atomic_write(path) as file:
        file.write(header.tobytes() + hashes[order].T.astype("<u8").tobytes())
        file.write(ends.astype("<i8").tobytes() + counts.astype("<i8").tobytes())
        file.write(np.concatenate([documents[i] for i in order]).astype(dtype).tobytes())


class Chunk:
    """An open chunk; its arrays stay on disk until they are used."""

    def __init__(self, path: Path):
        data = np.memmap(path, np.uint8, "r")
        header = data[: _HEADER.itemsize].view(_HEADER)[0] if len(data) >= _HEADER.itemsize else None
        if header is None or header["magic"] != _MAGIC:
            raise UserError(f"{path} is not a spill chunk: start again with --fresh")
        documents = int(header["documents"])
        start = _HEADER.itemsize + 32 * documents
        if len(data) != start + header["tokens"] * header["token_bytes"]:
            raise UserError(f"{path} is damaged ({len(data)} bytes): start again with --fresh")
        index = data[_HEADER.itemsize : start].view("<u8").reshape(4, documents)
        self._high, self._low = index[:2]
        self._ends, self._contexts = index[2:].view("<i8")
        self._tokens = data[start:].view(f"<u{header['token_bytes']}")

    def first_hash(self) -> int:
        """Upper half of the smallest hash."""
        return int(self._high[0])

    def tokens_below(self, bounds: Sequence[int]) -> np.ndarray:
        """Tokens of the documents whose upper hash is below each bound, int64 [bounds]."""
        counts = [self._place(bound) for bound in bounds]
        return np.array([self._ends[count - 1] if count else 0 for count in counts], np.int64)

    def read(self, low: int, high: int) -> Documents:
        """Documents whose upper hash lies in [low, high)."""
        first, last = self._place(low), self._place(high)
        start = int(self._ends[first - 1]) if first else 0
        ends = np.array(self._ends[first:last]) - start
        hashes = np.stack([self._high[first:last], self._low[first:last]], axis=1)
        tokens = np.array(self._tokens[start : start + (int(ends[-1]) if len(ends) else 0)])
        return Documents(hashes, ends, np.array(self._contexts[first:last]), tokens)

    def _place(self, bound: int) -> int:
        """Number of documents whose upper hash is below the bound, which may be 2^64."""
        return len(self._high) if bound >= 1 << 64 else int(np.searchsorted(self._high, np.uint64(bound)))


def tokens_below(chunks: Iterable[Path], bounds: Sequence[int]) -> np.ndarray:
    """Tokens of all documents whose upper hash is below each bound, int64 [bounds]. One chunk is open at a time: a large
    source has more of them than a process may open files.
    """
    return sum((Chunk(path).tokens_below(bounds) for path in chunks), np.zeros(len(bounds), np.int64))


def gather(parts: Sequence[Documents]) -> Documents:
    """Documents of several chunks as one, sorted by hash: the same whatever unit or worker they came from."""
    hashes = np.concatenate([part.hashes for part in parts])
    starts_of_parts = np.cumsum([0] + [len(part.tokens) for part in parts[:-1]])
    lengths = np.concatenate([part.lengths() for part in parts])
    starts = np.concatenate([part.ends - part.lengths() + start for part, start in zip(parts, starts_of_parts)])
    contexts = np.concatenate([part.contexts for part in parts])
    tokens = np.concatenate([part.tokens for part in parts])
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    taken = _take_ranges(tokens, starts[order], lengths[order])
    return Documents(hashes[order], np.cumsum(lengths[order]), contexts[order], taken)


def without_duplicates(documents: Documents) -> Documents:
    """The first of every run of documents with equal hashes (128 bits of a keyed hash of the text: equal means the same
    text).
    """
    same = (documents.hashes[1:] == documents.hashes[:-1]).all(axis=1)
    kept = np.concatenate([[True], ~same]) if len(documents.hashes) else np.zeros(0, bool)
    lengths = documents.lengths()
    tokens = _take_ranges(documents.tokens, (documents.ends - lengths)[kept], lengths[kept])
    return Documents(documents.hashes[kept], np.cumsum(lengths[kept]), documents.contexts[kept], tokens)


def _take_ranges(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[start : start + length] of every range, joined."""
    pieces = [values[start : start + length] for start, length in zip(starts.tolist(), lengths.tolist())]
    return np.concatenate(pieces) if pieces else values[:0]
