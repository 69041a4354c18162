"""The two stages: each owns its models and turns a batch into a loss. Nothing else differs between training a VAE and a DiT.

A stage's loss for a micro-batch is its sum over tokens divided by the *step's* token counts over all micro-batches and ranks, so
that gradients add up to the same whatever the number of ranks, rows or accumulation steps. Frozen models hide from DeepSpeed:
they are not registered as submodules, so they are neither sharded nor optimised nor saved.

Shape letters: T packed tokens, B rows, D width, Z latent dim, F teacher features, W windows.
"""

import torch
from torch import nn

from data_pipeline.format.manifest import Manifest
from modeling.layers import Transformer
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.config.sections import Train
from pretrain.stages.dit import DiTStage
from pretrain.stages.vae import VAEStage


def build_stage(config: RunConfig, device: torch.device) -> VAEStage | DiTStage:
    """The stage that a configuration names, on `device`. Raises: UserError."""
    manifest = Manifest.load(config.data.path)
    stage = stage_kind(config.stage).stage(config, manifest, device)
    prepare_blocks(stage, config.train)
    return stage.to(device)


def prepare_blocks(stage: nn.Module, train: Train) -> None:
    """Activation checkpointing and compilation of every Transformer's blocks, as configured."""
    for module in stage.modules():
        if isinstance(module, Transformer):
            module.checkpoint_every = train.activation_checkpointing
            if train.compile:
                for block in module.blocks:
                    block.compile(dynamic=False)
