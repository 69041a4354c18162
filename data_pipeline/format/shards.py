"""Shards: plain WebDataset tars of rows, written byte for byte reproducibly and read without tarfile or pickle.

Row r of a shard is one file per array, named `{r:09d}.{array}.npy`, in a fixed order. A token shard holds `tokens`
(uint16 or uint32 [R], zeros behind the last window) and `lengths` (int32, one per window); a feature shard holds
`features` and `scales`.

Because the writer is deterministic, the reader knows every header's bytes in advance and compares them: any other name,
size, type, dtype, shape or order is refused. `tar`, Python's tarfile and stock webdataset read these files like any
other tar.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write, open_file

_BLOCK = 512
_NPY_HEADER = 128
_END = bytes(2 * _BLOCK)
_SIZE_FIELD = slice(124, 135)
_CHECKSUM_FIELD = slice(148, 154)
_REMEDY = "copy the shard again from where it was prepared, or prepare the data again (--fresh)"
_FEATURES_REMEDY = (
    "copy the shard again, or run cache_features again, which replaces damaged shards and keeps the others"
)


@dataclass(frozen=True)
class Member:
    """One array of every row: its name, NumPy dtype name and shape; a first dimension of None is free."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one row's array; of one element along the first dimension where that is free."""
        return np.dtype(self.dtype).itemsize * math.prod(n for n in self.shape if n is not None)


class Written(NamedTuple):
    """What the manifest records of a shard file."""

    rows: int
    bytes: int
    sha256: str


def token_members(row_tokens: int, dtype: str) -> tuple[Member, ...]:
    """Arrays of a token shard."""
    return Member("tokens", dtype, (row_tokens,)), Member("lengths", "int32", (None,))


def write_shard(path: Path, members: Sequence[Member], rows: Iterable[Sequence[np.ndarray]]) -> Written:
    """Write a shard atomically; `rows` yields one array per member, in the members' order. Equal rows give equal
    bytes.
    """
    digest, num_bytes, num_rows = hashlib.sha256(), 0, 0
    with atomic_write(path) as file:
        for row, arrays in enumerate(rows):
            data = b"".join(_entry(row, member, array) for member, array in zip(members, arrays, strict=True))
            file.write(data)
            digest.update(data)
            num_rows, num_bytes = row + 1, num_bytes + len(data)
        file.write(_END)
        digest.update(_END)
    return Written(num_rows, num_bytes + len(_END), digest.hexdigest())


class ShardIndex(NamedTuple):
    """Where a shard's arrays lie, known once all of its headers were checked."""

    file: tuple[int, int, int]
    """Device, inode and modification time (ns) of the file that was checked."""
    stride: int
    """Bytes of a row where all rows take the same; else 0."""
    places: dict[str, np.ndarray]
    """Per member the offset of each row's data; of the first row's alone where rows are evenly spaced."""
    ragged: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per member with a free dimension a copy of the elements of all rows in turn, and where each row's end (`_ends`)."""


class Shard:
    """An open shard: random access to any range of rows without copying.

    Args:
        path: local file.
        members: the arrays that its rows must hold.
        rows, num_bytes: as the manifest has them.
        sha256: as the manifest has it; None skips the hash of the contents (sizes and headers are checked all the
            same).
        index: of the shard when it was open before: a file that has not changed since is not checked again.

    Raises:
        UserError: the file is missing, is not what the manifest says, or deviates from the format in any header.
    """

    def __init__(
        self,
        path: Path,
        members: Sequence[Member],
        rows: int,
        num_bytes: int,
        sha256: str | None,
        index: ShardIndex | None = None,
    ):
        self.path = path
        self.rows = rows
        self._members = {member.name: member for member in members}
        self._remedy = _REMEDY if "tokens" in self._members else _FEATURES_REMEDY
        self._buffer, self._file = self._map(num_bytes)
        if index is None or index.file != self._file:
            if sha256 is not None and (found := hashlib.sha256(self._buffer).hexdigest()) != sha256:
                raise UserError(
                    f"{path}: SHA-256 is {found[:16]}..., but the manifest says {sha256[:16]}...: {self._remedy}"
                )
            index = self._even_index(members) or self._index(members)
        self.index = index

    def dense(self, name: str, start: int, stop: int) -> np.ndarray:
        """Arrays of fixed shape of rows [start, stop): [rows, ...], a read-only view of the file where its rows are
        evenly spaced.
        """
        member, (_, stride, places, _) = self._members[name], self.index
        shape = tuple(n for n in member.shape if n is not None)
        if stride and start < stop:
            first = int(places[name][0]) + start * stride
            flat = np.ndarray((stop - start, member.row_bytes), np.uint8, self._buffer, first, (stride, 1))
            return flat.view(member.dtype).reshape(stop - start, *shape)
        rows = [
            np.frombuffer(self._buffer, member.dtype, member.row_bytes // np.dtype(member.dtype).itemsize, p)
            for p in places[name][start:stop]
        ]
        return np.stack(rows).reshape(len(rows), *shape) if rows else np.zeros((0, *shape), member.dtype)

    def ragged(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Arrays with a free first dimension of rows [start, stop): all their elements in turn, and the number in each
        row.
        """
        values, ends = self.index.ragged[name]
        return values[ends[start] : ends[stop]], ends[start + 1 : stop + 1] - ends[start:stop]

    def _map(self, num_bytes: int) -> tuple[mmap.mmap, tuple[int, int, int]]:
        """The contents, and `ShardIndex.file`: taken before they are checked, so that a change meanwhile shows later."""
        try:
            with open_file(self.path) as file:
                found = os.fstat(file.fileno())
                if found.st_size != num_bytes:
                    raise UserError(
                        f"{self.path}: has {found.st_size} bytes, but the manifest says {num_bytes}: {self._remedy}"
                    )
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                return buffer, (found.st_dev, found.st_ino, found.st_mtime_ns)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}): {self._remedy}") from None

    def _even_index(self, members: Sequence[Member]) -> ShardIndex | None:
        """What `_index` finds, of a shard that is right and whose rows all take as many bytes, tens of times faster; None
        otherwise: then `_index` says what is wrong, or takes the rows one by one.
        """
        stride, rest = divmod(len(self._buffer) - len(_END), self.rows)
        if rest or not stride or stride % _BLOCK or self._buffer[-len(_END) :] != _END:
            return None
        rows_BS = np.frombuffer(self._buffer, np.uint8, self.rows * stride).reshape(self.rows, stride)
        index, offset = ShardIndex(self._file, stride, {}, {}), 0
        for member in members:
            start = offset + _BLOCK + _NPY_HEADER
            if start > stride:
                return None
            if None in member.shape:
                octal = rows_BS[:, offset : offset + _BLOCK][:, _SIZE_FIELD].astype(np.int64) - ord("0")
                sizes = (octal << 3 * np.arange(octal.shape[1])[::-1]).sum(axis=1)
            else:
                sizes = np.full(self.rows, _NPY_HEADER + member.row_bytes)
            counts = (sizes - _NPY_HEADER) // member.row_bytes
            padded = int(sizes[0]) + -int(sizes[0]) % _BLOCK
            if sizes.min() < _NPY_HEADER or sizes.max() > padded or offset + _BLOCK + padded > stride:
                return None
            headers = rows_BS[:, offset:start]
            if not np.array_equal(headers, _expected_headers(self.rows, member, sizes, counts)):
                return None
            index.places[member.name] = np.array([start])
            if None in member.shape:
                most = int(counts.max())
                shape = (self.rows, most * member.row_bytes)
                values = np.ndarray(shape, np.uint8, self._buffer, start, (stride, 1)).view(member.dtype)
                index.ragged[member.name] = values[np.arange(most) < counts[:, None]], _ends(counts)
            offset += _BLOCK + padded
        return index if offset == stride else None

    def _index(self, members: Sequence[Member]) -> ShardIndex:
        """The index after checking every header, one by one."""
        offset = 0
        found: dict[str, tuple[list[int], list[int]]] = {member.name: ([], []) for member in members}
        for row in range(self.rows):
            for member in members:
                size = self._size(offset, row, member)
                if self._buffer[offset : offset + _BLOCK] != _tar_header(row, member.name, size):
                    raise UserError(self._explain(offset, row, member, size))
                count = (size - _NPY_HEADER) // member.row_bytes
                start = offset + _BLOCK + _NPY_HEADER
                if self._buffer[offset + _BLOCK : start] != _npy_header(member, count):
                    raise UserError(
                        f"{self.path}: {_member_name(row, member.name)} is not the expected array of {member.dtype}: "
                        f"{self._remedy}"
                    )
                found[member.name][0].append(start)
                found[member.name][1].append(count)
                offset += _BLOCK + size + -size % _BLOCK
        if self._buffer[offset:] != _END:
            extra = len(self._buffer) - offset - len(_END)
            raise UserError(
                f"{self.path}: {extra} bytes too many behind the {self.rows} rows of the manifest, or no end mark: "
                f"{self._remedy}"
            )
        starts = {name: np.array(places, np.int64) for name, (places, _) in found.items()}
        index = ShardIndex(self._file, 0, starts, {})
        for member in members:
            if None in member.shape:
                parts = [np.frombuffer(self._buffer, member.dtype, count, p) for p, count in zip(*found[member.name])]
                index.ragged[member.name] = np.concatenate(parts), _ends(found[member.name][1])
        return index

    def _size(self, offset: int, row: int, member: Member) -> int:
        """Size of the member whose header stands at the offset, checked to be possible."""
        if None not in member.shape:
            size = _NPY_HEADER + member.row_bytes
        else:
            try:
                size = int(self._buffer[offset : offset + _BLOCK][_SIZE_FIELD], 8)
            except ValueError:
                size = -1
            if size < _NPY_HEADER or (size - _NPY_HEADER) % member.row_bytes:
                raise UserError(self._explain(offset, row, member, size))
        if offset + _BLOCK + size + len(_END) > len(self._buffer):
            raise UserError(
                f"{self.path}: ends within {_member_name(row, member.name)}, although the manifest promises "
                f"{self.rows} rows: {self._remedy}"
            )
        return size

    def _explain(self, offset: int, row: int, member: Member, size: int) -> str:
        """Message for a tar header that is not the expected one."""
        header, expected = self._buffer[offset : offset + _BLOCK], _member_name(row, member.name)
        name = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
        offence = (
            f"found the name {name!r}"
            if name != expected
            else f"its header is not a plain file of {size} bytes with a right checksum"
        )
        return f"{self.path}: expected {expected} at byte {offset}, but {offence}: {self._remedy}"


def _ends(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each row's elements end among all in turn, with a 0 before the first."""
    return np.concatenate([[0], np.cumsum(counts)])


def _member_name(row: int, name: str) -> str:
    return f"{row:09d}.{name}.npy"


def _expected_headers(num_rows: int, member: Member, sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Tar and .npy headers of the member in rows 0, 1, ... (uint8 [rows, 640]), by the rules of `_tar_header`."""
    _, first, kind = np.unique(sizes, return_index=True, return_inverse=True)
    pairs = zip(sizes[first].tolist(), counts[first].tolist())
    texts = [_tar_header(0, member.name, size) + _npy_header(member, count) for size, count in pairs]
    headers = np.stack([np.frombuffer(text, np.uint8) for text in texts])[kind]
    digits = np.arange(num_rows)[:, None] // 10 ** np.arange(9)[::-1] % 10
    sums = np.array([int(text[_CHECKSUM_FIELD], 8) for text in texts])[kind] + digits.sum(axis=1)
    headers[:, :9] += digits.astype(np.uint8)
    headers[:, _CHECKSUM_FIELD] = (sums[:, None] >> 3 * np.arange(6)[::-1]) % 8 + ord("0")
    return headers


def _entry(row: int, member: Member, array: np.ndarray) -> bytes:
    """Tar entry of one array: header, .npy file, zeros up to the next block."""
    expected = tuple(len(array) if n is None else n for n in member.shape)
    if array.dtype != np.dtype(member.dtype) or array.shape != expected:
        raise ValueError(f"row {row}: {member.name} is {array.dtype}{array.shape}, expected {member.dtype}{expected}")
    data = _npy_header(member, len(array)) + np.ascontiguousarray(array).tobytes()
    return _tar_header(row, member.name, len(data)) + data + bytes(-len(data) % _BLOCK)


@lru_cache(maxsize=4096)
def _npy_header(member: Member, count: int) -> bytes:
    """Header of a version 1.0 .npy file; written here because NumPy's own padding has changed between its versions."""
    shape = tuple(count if n is None else n for n in member.shape)
    descr = np.dtype(member.dtype).newbyteorder("<").str
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    return (
        b"\x93NUMPY\x01\x00" + (_NPY_HEADER - 10).to_bytes(2, "little") + text.ljust(_NPY_HEADER - 11).encode() + b"\n"
    )


def _tar_header(row: int, name: str, size: int) -> bytes:
    """ustar header of a regular file, mode 0644, owner 0, time 0."""
    digits = b"%09d" % row
    before, after, base = _tar_template(name, size)
    return digits + before + b"%06o\0 " % (base + sum(digits)) + after


@lru_cache(maxsize=65536)
def _tar_template(name: str, size: int) -> tuple[bytes, bytes, int]:
    """Parts of the header between the row's digits and the checksum, behind it, and the sum of their bytes."""
    before = (
        f".{name}.npy".encode().ljust(91, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"0" * 11
        + b"\0"
    )
    after = (b"0" + bytes(100) + b"ustar\00000" + bytes(64) + b"0000000\0" * 2).ljust(_BLOCK - 156, b"\0")
    return before, after, sum(before) + sum(after) + 8 * ord(" ")  # the checksum field counts as spaces
