"""Reading rows: open shards on demand, check them before their first use, keep a bounded number of them open.

Everything here is stateless towards training: which rows a step needs is order.py's business, so any thread may read
any step.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import CACHE_GIGABYTES, ShardFiles
from data_pipeline.format.manifest import FeatureManifest, Manifest, ShardInfo
from data_pipeline.format.shards import Member, Shard, ShardIndex, token_members
from data_pipeline.reading.order import Span


class _Info(Protocol):
    name: str
    rows: int
    bytes: int
    sha256: str


class ShardPool:
    """The open shards of one split, least recently used closed first. Safe to use from several threads.

    Args:
        folder: local path or URL of the prepared folder.
        members: arrays of a row.
        infos: the manifest's entries.
        verify: compare SHA-256 before the first use of each shard, and again where its file has changed since. Its headers are
            checked with it, and without.
        cache_dir, cache_gigabytes: where shards of URLs are kept, and how many; see storage.py.
        capacity: number of shards kept open, at least the number of streams read.
    """

    def __init__(
        self,
        folder: str,
        members: Sequence[Member],
        infos: Sequence[_Info],
        verify: bool = True,
        cache_dir: str | None = None,
        cache_gigabytes: float = CACHE_GIGABYTES,
        capacity: int = 16,
    ):
        self._files = ShardFiles(folder, cache_dir, cache_gigabytes)
        self._members, self._infos, self._verify, self._capacity = members, infos, verify, capacity
        self._indices: dict[int, ShardIndex] = {}  # of all shards checked so far: 8 bytes a row and 4 a window
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._lock = threading.Lock()

    def shard(self, index: int) -> Shard:
        """The open shard; whoever asks first opens it while others wait. Raises UserError if it is not what the
        manifest says.
        """
        with self._lock:
            future = self._open.get(index)
            mine = future is None
            if future is None:
                future = self._open[index] = Future()
            self._open.move_to_end(index)
            while len(self._open) > self._capacity:
                self._open.popitem(last=False)
        if mine:
            try:
                future.set_result(self._open_shard(index))
            except BaseException as error:
                with self._lock:
                    self._open.pop(index, None)
                future.set_exception(error)
        return future.result()

    def is_open(self, index: int) -> bool:
        """Whether the shard is open or being opened."""
        return index in self._open

    def _open_shard(self, index: int) -> Shard:
        info = self._infos[index]
        known = self._indices.get(index)
        fetched_again = False
        while True:
            path = self._files.path(info.name, info.bytes, info.sha256)
            try:
                sha256 = info.sha256 if self._verify else None
                shard = Shard(path, self._members, info.rows, info.bytes, sha256, known)
                if isinstance(info, ShardInfo) and shard.index is not known:
                    _check_counts(shard, info)
                break
            except UserError:
                if self._files.is_evicted(path):
                    continue  # another thread or process needed room just before we opened it: fetch it again
                if fetched_again or not self._files.discard(path):
                    raise
                fetched_again = True  # a copy that rotted in the cache; what is downloaded is checked on its way
        self._indices[index] = shard.index
        return shard


def _check_counts(shard: Shard, info: ShardInfo) -> None:
    """Refuse windows that are not as many, or not as long together, as the manifest says, even where hashes are not
    verified.
    """
    lengths, _ = shard.ragged("lengths", 0, shard.rows)
    found = (len(lengths), int(lengths.sum(dtype=np.int64)))
    if found != (info.windows, info.tokens):
        raise UserError(
            f"{shard.path}: holds {found[0]} windows and {found[1]} tokens, the manifest says {info.windows} and "
            f"{info.tokens}: copy the shard again, or prepare the data again"
        )


class _Rows:
    """Rows of one split, read from its shards."""

    _pool: ShardPool

    def open(self, shard: int) -> None:
        """Open a shard before its rows are due."""
        self._pool.shard(shard)

    def is_open(self, shard: int) -> bool:
        """Whether the shard is open or being opened."""
        return self._pool.is_open(shard)


class FlatRows(NamedTuple):
    """Rows with the windows of all of them in turn."""

    tokens_BR: np.ndarray
    """A view of the file."""
    lengths_W: np.ndarray
    counts_B: np.ndarray
    """Number of windows of each row."""
    contexts_W: np.ndarray | None
    """Tokens at each window's beginning that are its context; None where the data does not split its windows."""


class TokenRows(_Rows):
    """Rows of a prepared folder's split."""

    def __init__(self, folder: str, manifest: Manifest, split: str, **options: Any):
        self.row_tokens = manifest.row_tokens
        self._vocab_size = manifest.tokenizer.vocab_size
        self._has_contexts = manifest.pairs is not None
        members = token_members(manifest.row_tokens, manifest.token_dtype, self._has_contexts)
        self._pool = ShardPool(folder, members, manifest.splits[split], **options)

    def read(self, span: Span) -> tuple[np.ndarray, list[np.ndarray]]:
        """Tokens [rows, R] (a view of the file) and each row's window lengths."""
        rows = self.read_flat(span)
        return rows.tokens_BR, np.split(rows.lengths_W, np.cumsum(rows.counts_B)[:-1])

    def read_flat(self, span: Span) -> FlatRows:
        """The rows of a span, checked. Raises: UserError."""
        shard = self._pool.shard(span.shard)
        tokens = shard.dense("tokens", span.start, span.stop)
        lengths, counts = shard.ragged("lengths", span.start, span.stop)
        self._check(shard, span.start, tokens, lengths, counts)
        if not self._has_contexts:
            return FlatRows(tokens, lengths, counts, None)
        contexts, context_counts = shard.ragged("contexts", span.start, span.stop)
        _check_contexts(shard, span.start, lengths, counts, contexts, context_counts)
        return FlatRows(tokens, lengths, counts, contexts)

    def _check(self, shard: Shard, start: int, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> None:
        """Refuse contents that would crash or poison training, even where hashes are not verified."""
        if not counts.all() or lengths.min() < 1:
            bad_B = np.ones(len(counts), bool)
        else:
            bad_B = np.add.reduceat(lengths, np.cumsum(counts) - counts, dtype=np.int64) > self.row_tokens
        if bad_B.any():
            raise UserError(
                f"{shard.path}: the window lengths of row {start + int(bad_B.argmax())} or a later one do not fit a "
                "row of "
                f"{self.row_tokens} tokens: copy the shard again, or prepare the data again"
            )
        if (largest := int(tokens.max())) >= self._vocab_size:
            raise UserError(
                f"{shard.path}: rows {start} to {start + len(tokens) - 1} hold token {largest}, but the vocabulary has "
                f"{self._vocab_size}: copy the shard again, or prepare the data again"
            )


def _check_contexts(
    shard: Shard,
    start: int,
    lengths: np.ndarray,
    counts: np.ndarray,
    contexts: np.ndarray,
    context_counts: np.ndarray,
) -> None:
    """Refuse context lengths that are not one a window, or leave it no target."""
    remedy = "copy the shard again, or prepare the data again"
    if (uneven_B := counts != context_counts).any():
        row = int(uneven_B.argmax())
        raise UserError(
            f"{shard.path}: row {start + row} has {context_counts[row]} context lengths for {counts[row]} windows: {remedy}"
        )
    if (bad_W := (contexts < 0) | (contexts >= lengths)).any():
        window = int(bad_W.argmax())
        row = int(np.searchsorted(np.cumsum(counts), window, side="right"))
        raise UserError(
            f"{shard.path}: row {start + row} has a context of {contexts[window]} tokens in a window of {lengths[window]}, expected 0 "
            f"to {lengths[window] - 1}: {remedy}"
        )


class FeatureRows(_Rows):
    """Rows of a feature cache's split."""

    def __init__(self, folder: str, manifest: FeatureManifest, split: str, **options: Any):
        self.arrays = {name: Member(name, info.dtype, tuple(info.shape)) for name, info in manifest.members.items()}
        self._pool = ShardPool(folder, list(self.arrays.values()), manifest.splits[split], **options)

    def read(self, span: Span) -> dict[str, np.ndarray]:
        """Every array of the rows, [rows, R, ...], views of the file."""
        shard = self._pool.shard(span.shard)
        return {name: shard.dense(name, span.start, span.stop) for name in self.arrays}
