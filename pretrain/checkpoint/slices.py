"""The files of a checkpoint: slices in safetensors, and a manifest that vouches for them.

    checkpoints/step-000000500/manifest.json          what it is; the SHA-256 of every file, and of itself
                               rank-00000.safetensors "ema/blocks.0.qkv.weight@4096": elements from 4096 on, flattened
    checkpoints/latest                                name of the newest, for people and scripts

A slice is a range of one state of one parameter. Which ranges a file holds depends on how the writing run was sharded;
a reader takes what overlaps the ranges it wants, and need not care. Nothing here knows DeepSpeed or process groups.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.core.errors import UserError

FORMAT = "textldm-checkpoint-1"
MANIFEST = "manifest.json"
FOLDER = "checkpoints"
BUFFER = "buffer"
CHUNK_BYTES = 1 << 24

_DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    `step`: steps done, so the next one is number `step`. `adam_step`: AdamW's counter, less by the skipped steps.
    `parameters`: name -> {"shape", "decays"}. `aliases`: further names of tied parameters. `files`: name -> {"bytes",
    "sha256"}. `extra`: the caller's.
    """

    step: int
    adam_step: int
    world_size: int
    zero_stage: int
    precision: str
    states: list[str]
    parameters: dict[str, dict[str, Any]]
    aliases: dict[str, str]
    files: dict[str, dict[str, Any]]
    extra: dict[str, Any]
    versions: dict[str, str]
    format: str = FORMAT
    path: Path = field(default=Path(), compare=False)

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically, with the hash of its own content inside."""
        content = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "path"}
        write_atomically(folder / MANIFEST, json.dumps(content | {"sha256": _digest(content)}, indent=1))

    def shape(self, name: str) -> torch.Size:
        """Full shape of a parameter."""
        return torch.Size(self.parameters[name]["shape"])


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint folder, its own hash checked. Raises: UserError with the reason."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        stated = content.pop("sha256")
        if content.get("format") != FORMAT:
            raise UserError(f"{path} has format {content.get('format')!r}; this version reads {FORMAT!r}")
        if stated != _digest(content):
            raise UserError(f"{path / MANIFEST} was altered: its content does not have the hash that it states")
        return Manifest(**content, path=path)
    except FileNotFoundError:
        raise UserError(f"{path} has no {MANIFEST}: the save was not finished, or this is not a checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path / MANIFEST} cannot be read: {error}") from None


def check_sizes(manifest: Manifest) -> None:
    """Every file is there in its stated size. Raises: UserError naming the file."""
    for name, stated in manifest.files.items():
        file = manifest.path / name
        if not file.is_file():
            raise UserError(f"{file} is missing")
        if file.stat().st_size != stated["bytes"]:
            raise UserError(f"{file} has {file.stat().st_size} bytes, the manifest says {stated['bytes']}")


def check_hashes(manifest: Manifest, part: int = 0, parts: int = 1) -> None:
    """Files number `part`, `part` + `parts`, ... have their stated SHA-256. Raises: UserError naming the file."""
    for name in sorted(manifest.files)[part::parts]:
        digest = hashlib.sha256()
        with (manifest.path / name).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
        if digest.hexdigest() != manifest.files[name]["sha256"]:
            raise UserError(f"{manifest.path / name} was altered: its SHA-256 is not the one in the manifest")


class SliceReader:
    """All slices of a checkpoint by state and parameter, read range by range. A context manager.

    Raises: UserError if a file cannot be read or a wanted range is not covered.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: list[Any] = []
        self._slices: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._buffers: dict[str, Any] = {}
        for name in sorted(manifest.files):
            try:
                file = safe_open(manifest.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{manifest.path / name} cannot be read: {error}") from None
            self._files.append(file)
            for key in file.keys():  # noqa: SIM118 (a safetensors file, not a dictionary)
                state, _, rest = key.partition("/")
                if state == BUFFER:
                    self._buffers[rest] = file
                    continue
                parameter, _, start = rest.rpartition("@")
                numel = file.get_slice(key).get_shape()[0]
                self._slices.setdefault((state, parameter), []).append((int(start), numel, file, key))

    def __enter__(self) -> "SliceReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._slices.clear()
        self._buffers.clear()

    def read_into(self, target: Tensor, state: str, parameter: str, start: int) -> None:
        """Fill the one-dimensional `target` with elements [start, start + len(target)) of the flattened parameter."""
        end, covered = start + target.numel(), 0
        for begin, numel, file, key in self._slices.get((state, parameter), []):
            low, high = max(begin, start), min(begin + numel, end)
            if low < high:
                target[low - start : high - start] = file.get_slice(key)[low - begin : high - begin]
                covered += high - low
        if covered != target.numel():
            raise UserError(
                f"{self.manifest.path} is incomplete: {covered} of {target.numel()} elements of {state}/{parameter}"
            )

    def full(self, state: str, parameter: str) -> Tensor:
        """A whole parameter's state, in its shape."""
        shape = self.manifest.shape(parameter)
        tensor = torch.empty(shape.numel())
        self.read_into(tensor, state, parameter, 0)
        return tensor.view(shape)

    def buffers(self) -> dict[str, Tensor]:
        """Module buffers, and what the caller of save() added (copies: the library's own are windows into the file)."""
        return {name: file.get_tensor(f"{BUFFER}/{name}").clone() for name, file in self._buffers.items()}


def write_slices(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Write CPU tensors as a safetensors file, fsynced; returns its {"bytes", "sha256"}.

    Written here rather than by the library so that the bytes are hashed on their way and never copied.
    """
    tensors = [(name, tensor.contiguous()) for name, tensor in tensors]
    header, offset = {}, 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for content in [memoryview(struct.pack("<Q", len(text)) + text), *(_bytes_of(tensor) for _, tensor in tensors)]:
            for start in range(0, len(content), CHUNK_BYTES):
                chunk = content[start : start + CHUNK_BYTES]
                digest.update(chunk)
                num_bytes += len(chunk)
                while len(chunk):  # a raw write may take less than it is given
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def folder_name(step: int) -> str:
    """step-000000500"""
    return f"step-{step:09d}"


def saved_steps(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the saved checkpoints, newest first, unchecked."""
    names = ((re.fullmatch(r"step-(\d{9,})", path.name), path) for path in folder.glob("step-*"))
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


def remove_checkpoint(path: Path) -> None:
    """Under another name first: a folder that is half deleted must not look like a checkpoint."""
    doomed = path.with_name(f"{path.name}.deleted")
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Replace a small file as a whole: a reader sees the old content or the new one; if `durable`, also after a power cut.

    Else the folder is not touched any more once the new content is seen: who sees it may rename the folder.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    beside.replace(path)
    if durable:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files' content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
