"""Every state of a run, whole and by name ("ema/block.up.weight"): out of an engine in training, or out of a checkpoint."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.engine.engine import Engine


def gather_full(engine: Engine) -> dict[str, Tensor]:
    """Full fp32 tensors of every state on every rank. Collective."""
    partition = engine.partition
    full = {
        f"{state}/{name}": torch.zeros(parameter.numel)
        for name, parameter in partition.parameters.items()
        for state in parameter.states
    }
    for state, held, view in partition.views(partition.owned):
        full[f"{state}/{held.name}"][held.start : held.start + held.numel] = view
    packed = torch.cat(list(full.values()))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(packed)
    parts = packed.split([tensor.numel() for tensor in full.values()])
    shapes = [partition.parameters[name.partition("/")[2]].shape for name in full]
    return {name: part.clone().view(shape) for name, part, shape in zip(full, parts, shapes, strict=True)}


def saved_states(run: Path) -> dict[str, Tensor]:
    """Of a checkpoint, or of the newest one of a run, with the stage's buffers under every state."""
    states = read_manifest(checkpoint_of(run)).states
    return {f"{state}/{name}": tensor for state in states for name, tensor in read_tensors(run, state).items()}
