"""Checkpoints that somebody forged: other contents, and a manifest whose hashes are right."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.manifest import FORMAT, SavedFile, SavedPart, _digest
from pretrain.checkpoint.slices import write_slices
from pretrain.checkpoint.storage import Checkpoint, Folder

FILE = "rank-00000.safetensors"


def parameter(numel: int = 4) -> dict[str, Any]:
    """One parameter `w` of the manifest, with its weights alone."""
    return {"w": {"shape": [numel], "decays": True, "states": ["weight"]}}


def forge(
    folder: Path,
    tensors: dict[str, torch.Tensor] | bytes,
    change: Callable[[dict[str, Any]], object] = lambda content: None,
    numel: int = 4,
) -> Checkpoint:
    """A checkpoint in the folder: of tensors, or of a file's bytes; `change` may do anything to the manifest before it is sealed."""
    checkpoint = Checkpoint(Folder(folder.parent), folder.name)
    if isinstance(tensors, bytes):
        checkpoint.storage.put(checkpoint.name, FILE, [tensors])
        saved = SavedFile(SavedPart(0, len(tensors), hashlib.sha256(tensors).hexdigest()), {})
    else:
        saved = write_slices(checkpoint, FILE, tensors.items())
    content: dict[str, Any] = {
        "step": 1, "updates": 1, "world_size": 1, "zero_stage": 0, "precision": "fp32", "parameters": parameter(numel),
        "aliases": {}, "files": {FILE: asdict(saved)}, "extra": {}, "versions": {},
        "format": FORMAT,
    }  # fmt: skip
    change(content)
    sealed = json.dumps(content | {"sha256": _digest(content)})
    checkpoint.storage.put(checkpoint.name, "manifest.json", [sealed.encode()])
    return checkpoint


def safetensors(header: dict[str, Any] | bytes, content: bytes = b"") -> bytes:
    """The bytes of a file with this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content
