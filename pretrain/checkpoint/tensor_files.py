"""safetensors files: written tensor by tensor, each asked for when its turn has come, and read likewise.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header (name -> dtype,
shape, offsets), the bytes. It is written and read here, not by its library, so that bytes are hashed on their way out and
never copied, that no more than one tensor need be in memory, and that a storage need not be a local file system; any safetensors
reader opens the files, and what is laid out in the library's order is byte for byte what the library writes.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from data_pipeline.core.outside import parse_json
from data_pipeline.core.storage import open_file

CHUNK_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, struct.error)
"""What reading a file raises that is no safetensors file, or a damaged one."""

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


class Hashed:
    """Pieces of a file on their way out, in chunks, counted, and hashed by a thread while they are being written."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces, self._digest, self.num_bytes = pieces, hashlib.sha256(), 0

    def __iter__(self) -> Iterator[memoryview]:
        with ThreadPoolExecutor(1) as pool:
            for piece in self._pieces:
                for start in range(0, len(piece), CHUNK_BYTES):
                    chunk = piece[start : start + CHUNK_BYTES]
                    hashed = pool.submit(self._digest.update, chunk)
                    self.num_bytes += len(chunk)
                    yield chunk
                    del chunk  # the memory of this tensor is free before the next one is asked for
                    hashed.result()
                del piece

    @property
    def sha256(self) -> str:
        """Of all that has been passed on."""
        return self._digest.hexdigest()


def file_pieces(
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Iterator[memoryview]:
    """A safetensors file in pieces: its header, then the bytes of each tensor, taken from `tensors` when its turn has come.

    Args:
        layout: dtype and shape of every tensor by name, in the order in which they lie there.
        tensors: those tensors, on the CPU.
        metadata: texts by name for the header.

    Raises: ValueError for a tensor that is not as it was laid out.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in layout.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    values = iter(tensors)
    for name, (dtype, shape) in layout.items():
        tensor = next(values)  # not by zip, which would hold it until the next one is there
        if tensor.dtype != dtype or tensor.shape != torch.Size(shape):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it was laid out as {dtype} {list(shape)}")
        yield _bytes_of(tensor.contiguous())
        del tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of an open file: what it is, and at which byte it begins."""

    file: BinaryIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read(self) -> Tensor:
        """The whole tensor. Raises: OSError."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_into(tensor, 0)
        return tensor

    def read_into(self, target: Tensor, start: int) -> None:
        """Fill a contiguous CPU tensor with the elements from `start` on. Raises: OSError."""
        self.file.seek(self.begin + start * self.dtype.itemsize)
        rest = _bytes_of(target)
        while len(rest):  # a raw read may give less than was asked for
            count = self.file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise OSError("the file ends early")
            rest = rest[count:]


def entries(file: BinaryIO) -> Iterator[tuple[str, Entry]]:
    """All tensors of a safetensors file by name. Raises: ValueError, KeyError, ... if it is none, or they do not share out its bytes."""
    size = file.seek(0, 2)
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    header = parse_json(file.read(length), _once)
    header.pop("__metadata__", None)
    taken = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, end) = _TORCH_DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 1 << 48 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has the shape {list(shape)!r:.80} at {begin!r:.40}")
        # Each byte is one tensor's: else a small file could ask for any amount of memory.
        if begin != taken or end > size - 8 - length or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not lie within it, side by side with the others")
        taken = end
        yield name, Entry(file, dtype, shape, 8 + length + begin)
    if taken != size - 8 - length:
        raise ValueError(f"{size - 8 - length - taken} of its bytes are no tensor's")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError for a name that stands twice."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files by name, each read when it is asked for. A context manager.

    Attributes:
        shapes: of all of them.

    Raises: one of UNREADABLE, of which ValueError for a name that stands in two files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files: list[BinaryIO] = []
        self._entries: dict[str, Entry] = {}
        try:
            for path in paths:
                file = open_file(path, buffering=0)
                self._files.append(file)
                for name, entry in entries(file):
                    if name in self._entries:
                        raise ValueError(f"{name} stands in two files")
                    self._entries[name] = entry
        except UNREADABLE:
            self.close()
            raise
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was read stays."""
        for file in self._files:
            file.close()


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, made or read when they are asked for.

    Attributes:
        shapes: of all of them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.shapes, self._read = shapes, read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def renamed(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    change: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> LazyTensors:
    """Some of these tensors by other names: `names` has theirs by the new ones.

    change: makes the new tensor, of the same shape, out of their name and tensor.
    """
    shapes = shapes_of(tensors)
    return LazyTensors(
        {new: shapes[old] for new, old in names.items()}, lambda new: change(names[new], tensors[names[new]])
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Shapes by name, which mappings that read know without reading."""
    known: Mapping[str, tuple[int, ...]] | None = getattr(tensors, "shapes", None)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()} if known is None else known


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(flat)
