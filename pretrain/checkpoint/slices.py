"""A checkpoint's tensors: slices of named parameters in safetensors files, written in one pass, read range by range.

    rank-00000.safetensors   "ema/blocks.0.qkv.weight@4096": elements of that state from 4096 on, flattened
                             "buffer/latents_mean": a buffer of the stage, whole

A slice is a range of one state of one parameter. Which ranges a file holds depends on how the writing run was sharded;
a reader takes what overlaps the ranges it wants, and need not care. Nothing here knows DeepSpeed or process groups.

The format (https://github.com/huggingface/safetensors): 8 bytes with the length of a JSON header, the header (name -> dtype,
shape, offsets), the bytes. It is written and read here, not by its library, so that bytes are hashed on their way out and
never copied, and that a storage need not be a local file system; any safetensors reader opens the files.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json
from pretrain.checkpoint.manifest import Manifest, SavedFile
from pretrain.checkpoint.storage import Checkpoint

BUFFER = "buffer"
CHUNK_BYTES = 1 << 24
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TORCH_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}


def write_slices(checkpoint: Checkpoint, file: str, tensors: Iterable[tuple[str, Tensor]]) -> SavedFile:
    """Write CPU tensors as a safetensors file; returns what the manifest says of it. Raises: OSError."""
    digest, num_bytes = hashlib.sha256(), 0

    def counted() -> Iterator[memoryview]:
        nonlocal num_bytes
        for piece in _encoded(tensors):
            for start in range(0, len(piece), CHUNK_BYTES):
                chunk = piece[start : start + CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                yield chunk

    checkpoint.storage.put(checkpoint.name, file, counted())
    return SavedFile(num_bytes, digest.hexdigest())


def _encoded(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[memoryview]:
    tensors = [(name, tensor.contiguous()) for name, tensor in tensors]
    header, offset = {}, 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for _, tensor in tensors:
        yield _bytes_of(tensor)


@dataclass(frozen=True)
class _Entry:
    """One tensor of an open file: what it is, and at which byte it begins."""

    file: BinaryIO
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    def read_into(self, target: Tensor, start: int) -> None:
        """Fill a contiguous CPU tensor with the elements from `start` on. Raises: OSError."""
        self.file.seek(self.begin + start * self.dtype.itemsize)
        rest = _bytes_of(target)
        while len(rest):  # a raw read may give less than was asked for
            count = self.file.readinto(rest)  # type: ignore[attr-defined]
            if not count:
                raise OSError("the file ends early")
            rest = rest[count:]


def _entries(file: BinaryIO) -> Iterator[tuple[str, _Entry]]:
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
        yield name, _Entry(file, dtype, shape, 8 + length + begin)
    if taken != size - 8 - length:
        raise ValueError(f"{size - 8 - length - taken} of its bytes are no tensor's")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError for a name that stands twice."""
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return found


class SliceReader:
    """All slices of a checkpoint by state and parameter, read range by range. A context manager.

    They are held against the manifest before anything is read: every element of every state once, none twice, none besides.
    Raises: UserError if they are not, or a file cannot be read.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: list[BinaryIO] = []
        self._slices: dict[tuple[str, str], list[tuple[int, _Entry]]] = {}
        self._buffers: dict[str, _Entry] = {}
        for name in sorted(manifest.files):
            try:
                file = manifest.checkpoint.read(name)
                self._files.append(file)
                for key, entry in _entries(file):
                    state, _, rest = key.partition("/")
                    if state == BUFFER:
                        if rest in self._buffers or rest in manifest.parameters or rest in manifest.aliases:
                            raise ValueError(f"buffer {rest} has the name of a parameter or of another buffer")
                        self._buffers[rest] = entry
                    else:
                        parameter, _, start = rest.rpartition("@")
                        self._slices.setdefault((state, parameter), []).append((_place(start), entry))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError, struct.error) as error:
                self.__exit__()
                raise UserError(f"{manifest.checkpoint}/{name} cannot be read: {error}") from None
        try:
            self._check_cover()
        except UserError:
            self.__exit__()
            raise

    def _check_cover(self) -> None:
        expected = {
            (state, name): parameter.numel
            for name, parameter in self.manifest.parameters.items()
            for state in parameter.states
        }
        for state, parameter in self._slices.keys() - expected.keys():
            raise UserError(f"{self.manifest.checkpoint} holds {state}/{parameter}, which its manifest does not name")
        for (state, parameter), numel in expected.items():
            covered = 0
            for start, entry in sorted(self._slices.get((state, parameter), []), key=lambda slice_: slice_[0]):
                if len(entry.shape) != 1 or entry.dtype != torch.float32:
                    raise UserError(
                        f"{self.manifest.checkpoint}: {state}/{parameter}@{start} is {entry.dtype} {list(entry.shape)}, expected"
                        " torch.float32 of one dimension"
                    )
                if start != covered:
                    what = "more than once" if start < covered else "not at all"
                    raise UserError(
                        f"{self.manifest.checkpoint} is broken: it holds elements of {state}/{parameter} {what}, between"
                        f" {min(start, covered)} and {max(start, covered)}"
                    )
                covered += entry.shape[0]
            if covered != numel:
                raise UserError(
                    f"{self.manifest.checkpoint} is incomplete: {covered} of {numel} elements of {state}/{parameter}"
                )

    def __enter__(self) -> "SliceReader":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def read_into(self, target: Tensor, state: str, parameter: str, start: int) -> None:
        """Fill the one-dimensional `target` (fp32) with elements [start, start + len(target)) of the flattened parameter."""
        end, covered = start + target.numel(), 0
        host = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
        for begin, entry in self._slices.get((state, parameter), []):
            low, high = max(begin, start), min(begin + entry.shape[0], end)
            if low < high:
                entry.read_into(host[low - start : high - start], low - begin)
                covered += high - low
        if covered != target.numel():
            raise UserError(
                f"{self.manifest.checkpoint} is incomplete: {covered} of {target.numel()} elements of {state}/{parameter}"
            )
        if host is not target:
            target.copy_(host)

    def full(self, state: str, parameter: str) -> Tensor:
        """A whole parameter's state, in its shape."""
        shape = self.manifest.shape(parameter)
        tensor = torch.empty(math.prod(shape))
        self.read_into(tensor, state, parameter, 0)
        return tensor.view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """The stage's buffers."""
        found = {}
        for name, entry in self._buffers.items():
            found[name] = torch.empty(entry.shape, dtype=entry.dtype)
            entry.read_into(found[name], 0)
        return found


def _place(text: str) -> int:
    """The element from which on a slice holds them. Raises: ValueError."""
    if not text.isdecimal() or len(text) > 15:
        raise ValueError(f"a slice begins at {text[:40]!r}")
    return int(text)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    return memoryview(flat)
