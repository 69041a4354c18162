"""Shards: WebDataset tars of rows, written by webdataset's TarWriter and read without tarfile or pickle.

Row r of a shard is one file per array, named `{r:09d}.{array}.npy`, in a fixed order. A token shard holds `tokens`
(uint16 or uint32 [R], zeros behind the last window) and `lengths` (int32, one per window), where the data splits its windows
itself also `contexts` (int32, one per window: its first tokens, which are context); a feature shard holds `features` and `scales`.

The writer is given a fixed time, owner and mode, so that equal rows give equal bytes. The reader knows every header's
bytes in advance and compares them: any other name, size, type, dtype, shape or order is refused.
"""

import hashlib
import math
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write, open_file

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tarfile, like tar, fills up the last one
_NPY_HEADER = 128
_MODE = 0o644
_SIZE_FIELD = slice(124, 135)
_CHECKSUM_FIELD = slice(148, 154)
_REMEDY = "copy the shard again from where it was prepared, or prepare the data again (--fresh)"
_FEATURES_REMEDY = (
    "copy the shard again, or run textldm cache again, which replaces damaged shards and keeps the others"
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


def token_members(row_tokens: int, dtype: str, contexts: bool = False) -> tuple[Member, ...]:
    """Arrays of a token shard, with the windows' context lengths where the data has them."""
    members = Member("tokens", dtype, (row_tokens,)), Member("lengths", "int32", (None,))
    return (*members, Member("contexts", "int32", (None,))) if contexts else members


def write_shard(path: Path, members: Sequence[Member], rows: Iterable[Sequence[np.ndarray]]) -> Written:
    """Write a shard atomically; `rows` yields one array per member, in the members' order. Equal rows give equal bytes."""
    from webdataset.writer import TarWriter  # late: it imports torch, which whoever only reads shards may not need

    num_rows = 0
    with atomic_write(path) as file:
        hashed = _HashedFile(file)
        settings: dict[str, Any] = {"user": "", "group": "", "mode": _MODE, "mtime": 0}
        with TarWriter(hashed, compress=False, encoder=False, **settings) as writer:
            for row, arrays in enumerate(rows):
                for member, array in zip(members, arrays, strict=True):
                    # One call for each: of several arrays in one, TarWriter sorts the names.
                    writer.write({"__key__": f"{row:09d}", f"{member.name}.npy": _npy_file(row, member, array)})
                num_rows = row + 1
    return Written(num_rows, hashed.num_bytes, hashed.digest.hexdigest())


class _HashedFile:
    """A file to write to that counts and hashes on the way."""

    def __init__(self, file: IO[bytes]):
        self._file, self.num_bytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def shard_bytes(members: Sequence[Member], num_rows: int) -> int:
    """Size of a shard of so many rows whose arrays all have fixed shapes. Of rows of 512 tokens of 8 bytes, tar and .npy headers
    and padding are a third; of 4096, a twentieth.
    """
    row_bytes = sum(_BLOCK + _padded(_NPY_HEADER + member.row_bytes) for member in members)
    return num_rows * row_bytes + _end_bytes(num_rows * row_bytes)


class ShardIndex(NamedTuple):
    """Byte positions of a shard's arrays, made by a check of all of its headers."""

    file: tuple[int, int, int]
    """Device, inode and modification time (ns) of the file that was checked."""
    stride: int
    """Bytes from one row to the next; 0 where rows differ in size."""
    places: dict[str, np.ndarray]
    """Per member the offset of the array of every row, int64 [rows]; with a stride only that of the first row, int64 [1]."""
    ragged: dict[str, tuple[np.ndarray, np.ndarray]]
    """Per member with a free dimension: its elements in all rows, concatenated, and the `_ends` of the rows among them."""


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
        """Arrays with a free first dimension of rows [start, stop): their elements, concatenated, and the number of each row."""
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
        """The index of a shard whose rows all take the same number of bytes, by comparing all headers at once, tens of times
        faster than `_index`. None if rows differ in size or anything is wrong: `_index` then goes row by row and names it.
        """
        stride = self._first_row_bytes(members)
        end = self.rows * stride
        if not stride or self._buffer[end:] != bytes(_end_bytes(end)):
            return None
        rows_BS = np.frombuffer(self._buffer, np.uint8, end).reshape(self.rows, stride)
        index, offset = ShardIndex(self._file, stride, {}, {}), 0
        for member in members:
            start = offset + _BLOCK + _NPY_HEADER
            if None in member.shape:
                octal = rows_BS[:, offset : offset + _BLOCK][:, _SIZE_FIELD].astype(np.int64) - ord("0")
                sizes = (octal << 3 * np.arange(octal.shape[1])[::-1]).sum(axis=1)
            else:
                sizes = np.full(self.rows, _NPY_HEADER + member.row_bytes)
            counts = (sizes - _NPY_HEADER) // member.row_bytes
            if sizes.min() < _NPY_HEADER or sizes.max() > _padded(int(sizes[0])):
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
            offset += _BLOCK + _padded(int(sizes[0]))
        return index

    def _first_row_bytes(self, members: Sequence[Member]) -> int:
        """Bytes that the first row takes by its headers' sizes; 0 if these are impossible."""
        offset = 0
        try:
            for member in members:
                offset += _BLOCK + _padded(self._size(offset, 0, member))
        except UserError:
            return 0
        return offset

    def _index(self, members: Sequence[Member]) -> ShardIndex:
        """The index, by checking the headers one by one. Raises: UserError that names the first wrong one."""
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
                offset += _BLOCK + _padded(size)
        if self._buffer[offset:] != bytes(_end_bytes(offset)):
            extra = len(self._buffer) - offset - _end_bytes(offset)
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
        if offset + _BLOCK + size + 2 * _BLOCK > len(self._buffer):
            raise UserError(
                f"{self.path}: ends within {_member_name(row, member.name)}, although the manifest promises "
                f"{self.rows} rows: {self._remedy}"
            )
        return size

    def _explain(self, offset: int, row: int, member: Member, size: int) -> str:
        """Message for a tar header that is not the expected one of the row's member."""
        header, expected = self._buffer[offset : offset + _BLOCK], _member_name(row, member.name)
        name = header[:100].rstrip(b"\0").decode("ascii", "backslashreplace")
        offence = (
            f"found the name {name!r}"
            if name != expected
            else f"its header is not a plain file of {size} bytes with a right checksum"
        )
        return f"{self.path}: expected {expected} at byte {offset}, but {offence}: {self._remedy}"


def _ends(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Cumulative counts with a leading 0, int64 [rows + 1]: row r's elements are [ends[r], ends[r + 1])."""
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


def _padded(size: int) -> int:
    """Bytes of whole blocks that a file of this size takes."""
    return size + -size % _BLOCK


def _end_bytes(offset: int) -> int:
    """Zeros behind the last entry: two blocks, and what fills the last record."""
    return 2 * _BLOCK + -(offset + 2 * _BLOCK) % _RECORD


def _npy_file(row: int, member: Member, array: np.ndarray) -> bytes:
    """The array as the contents of an .npy file. Raises: ValueError if it is not what the member says."""
    expected = tuple(len(array) if n is None else n for n in member.shape)
    if array.dtype != np.dtype(member.dtype) or array.shape != expected:
        raise ValueError(f"row {row}: {member.name} is {array.dtype}{array.shape}, expected {member.dtype}{expected}")
    return _npy_header(member, len(array)) + array.tobytes()


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
    """What TarWriter writes before a file: a ustar header with mode 0644, owner 0 without a name, time 0."""
    digits = b"%09d" % row
    before, after, base = _tar_template(name, size)
    return digits + before + b"%06o\0 " % (base + sum(digits)) + after


@lru_cache(maxsize=65536)
def _tar_template(name: str, size: int) -> tuple[bytes, bytes, int]:
    """Parts of the header between the row's digits and the checksum, behind it, and the sum of their bytes."""
    before = (
        f".{name}.npy".encode().ljust(91, b"\0")
        + b"%07o\0" % _MODE
        + b"0000000\0" * 2
        + b"%011o\0" % size
        + b"0" * 11
        + b"\0"
    )
    after = (b"0" + bytes(100) + b"ustar\00000").ljust(_BLOCK - 156, b"\0")
    return before, after, sum(before) + sum(after) + 8 * ord(" ")  # the checksum field counts as spaces
