"""Building the stage that a configuration names, with first weights or with those of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import LazyTensors, shapes_of
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.engine.optim import full_shape
from pretrain.ranks.distributed import ALONE, Together
from pretrain.stages.blocks import prepare_blocks
from pretrain.stages.earlier import earlier_weights
from pretrain.stages.fp8 import check_fp8, multiply_in_fp8

TRAINING_ONLY = ("repa.", "token_head.")
"""Names of what no exported model needs."""


def measure(config: RunConfig, manifest: Manifest, device: torch.device, together: Together = ALONE) -> None:
    """What the stage must know before it is built, if anything, into the run folder. Collective. Raises: UserError."""
    if own := stage_kind(config.stage).load("measure"):
        own(config, manifest, device, together)


def build_stage(config: RunConfig, manifest: Manifest, device: torch.device) -> Any:
    """The stage on `device`, with first weights drawn there by torch's generator; `measure` comes before it. Raises: UserError."""
    if config.train.precision == "fp8":
        check_fp8(device)
    stage = stage_kind(config.stage).load("stage")(config, manifest, device)
    if config.train.precision == "fp8":
        multiply_in_fp8(stage)
    prepare_blocks(stage, config.train)
    return stage.to(device)


def take_first_weights(stage: Any, config: RunConfig, manifest: Manifest) -> None:
    """Put the weights that the configuration names, if any, in place of the first weights. Raises: UserError, if they do not fit.

    What an export lacks, because only training has it, keeps its first weights.
    """
    if config.first_weights is None:
        return
    with earlier_weights(config, manifest) as (tensors, source):
        if isinstance(source, Path):
            tensors = _with_training_only(tensors, stage)
        stage.load_first(tensors, source)


def _with_training_only(tensors: Mapping[str, Tensor], stage: Any) -> Mapping[str, Tensor]:
    every = stage.state_dict(keep_vars=True)
    own = {name: p for name, p in every.items() if name.startswith(TRAINING_ONLY) and name not in tensors}
    shapes = {name: full_shape(p) for name, p in own.items()}
    return LazyTensors({**shapes_of(tensors), **shapes}, lambda name: own[name] if name in own else tensors[name])


def load_stage(config: RunConfig, path: Checkpoint, device: torch.device) -> Any:
    """The stage with the EMA weights of a checkpoint, in eval mode, without DeepSpeed, for one process. Raises: UserError."""
    config.train.compile, config.train.activation_checkpointing = False, 0
    if config.train.precision == "fp8":
        config.train.precision = "bf16"  # its parameters are the same
    manifest = config.data.manifest()
    measure(config, manifest, device)
    stage = build_stage(config, manifest, device)
    stage.load_trained(read_tensors(path, "ema"), path)
    return stage.eval().requires_grad_(False)
