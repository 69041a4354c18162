"""What checkpoints need of an engine, around a plain module: stage 0's partition has no DeepSpeed in it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.checkpoint.find import checkpoint_name
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.engine.optim import build_optimizer
from pretrain.engine.optimizer_settings import AdamWSettings, OptimizerSettings
from pretrain.engine.partition import partition_of
from pretrain.ranks.distributed import Topology
from tests.pretrain.engine_toy import ToyStage


def bare_engine(stage: nn.Module | None = None, seed: int = 0, optimizer: OptimizerSettings | None = None) -> Any:
    """An engine with random states that has made `seed` updates."""
    stage = stage or ToyStage()
    base = build_optimizer(stage, optimizer or AdamWSettings(lr=3e-4))
    names = {p: name for name, p in stage.named_parameters()}
    groups = {names[p]: number for number, group in enumerate(base.param_groups) for p in group["params"]}
    partition = partition_of(names, groups, base, base, rank=0, world_size=1)
    torch.manual_seed(seed)
    for _, _, view in partition.views():
        view.normal_()
    return SimpleNamespace(
        stage=stage, partition=partition, updates=seed, settings=SimpleNamespace(zero_stage=0, precision="fp32"),
        buffers=lambda: {"latents_mean": stage.latents_mean}, aliases=lambda: {},
    )  # fmt: skip


def states_of(engine: Any) -> dict[str, Tensor]:
    """All of its states by name."""
    return {f"{state}/{held.name}": view.clone() for state, held, view in engine.partition.views()}


def save(run: Path, step: int, engine: Any) -> Checkpoint:
    """Its checkpoint."""
    CheckpointWriter(run, Topology(), keep_last=100).save(step, engine, {"note": step}, blocking=True)
    return Checkpoint(storage_of(run), checkpoint_name(step))


def silent(_: str) -> None:
    """Takes reports of what was passed over."""
