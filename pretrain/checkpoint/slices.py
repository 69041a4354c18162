"""A checkpoint's tensors: slices of named parameters in safetensors files, written in one pass, read range by range.

    rank-00000.safetensors   "ema/blocks.0.qkv.weight@4096": elements of that state from 4096 on, flattened
                             "buffer/latents_mean": a buffer of the stage, whole

All slices of a state lie side by side in a file, whose manifest has a hash for each of these parts.
A slice is a range of one state of one parameter. Which ranges a file holds depends on how the writing run was sharded;
a reader takes what overlaps the ranges it wants, and need not care. Nothing here knows DeepSpeed or process groups.
"""

import math
from collections.abc import Iterable
from itertools import chain, islice
from typing import BinaryIO

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import BUFFER, Manifest, SavedFile, SavedPart
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import UNREADABLE, Entry, Hashed, entries, file_pieces


def write_slices(checkpoint: Checkpoint, file: str, tensors: Iterable[tuple[str, Tensor]]) -> SavedFile:
    """Write CPU tensors as a safetensors file; returns what the manifest says of it. Raises: OSError."""
    by_state: dict[str, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        by_state.setdefault(name.partition("/")[0], []).append((name, tensor))
    ordered = [slice_ for slices in by_state.values() for slice_ in slices]
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in ordered}
    pieces = file_pieces(layout, (tensor for _, tensor in ordered))
    parts = [Hashed(islice(pieces, count)) for count in (1, *map(len, by_state.values()))]
    checkpoint.storage.put(checkpoint.name, file, chain.from_iterable(parts))
    saved, begin = list[SavedPart](), 0
    for part in parts:
        saved.append(SavedPart(begin, part.num_bytes, part.sha256))
        begin += part.num_bytes
    return SavedFile(saved[0], dict(zip(by_state, saved[1:], strict=True)))


class SliceReader:
    """All slices of a checkpoint by state and parameter, read range by range. A context manager.

    They are held against the manifest before anything is read: every element of every state once, none twice, none besides.
    Raises: UserError if they are not, or a file cannot be read.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: list[BinaryIO] = []
        self._slices: dict[tuple[str, str], list[tuple[int, Entry]]] = {}
        self._buffers: dict[str, Entry] = {}
        for name in sorted(manifest.files):
            try:
                file = manifest.checkpoint.read(name)
                self._files.append(file)
                for key, entry in entries(file):
                    state, _, rest = key.partition("/")
                    if state == BUFFER:
                        if rest in self._buffers or rest in manifest.parameters or rest in manifest.aliases:
                            raise ValueError(f"buffer {rest} has the name of a parameter or of another buffer")
                        self._buffers[rest] = entry
                    else:
                        parameter, _, start = rest.rpartition("@")
                        self._slices.setdefault((state, parameter), []).append((_place(start), entry))
            except UNREADABLE as error:
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
        return {name: entry.read() for name, entry in self._buffers.items()}


def _place(text: str) -> int:
    """The element from which on a slice holds them. Raises: ValueError."""
    if not text.isdecimal() or len(text) > 15:
        raise ValueError(f"a slice begins at {text[:40]!r}")
    return int(text)
