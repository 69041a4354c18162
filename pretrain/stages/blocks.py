"""A Transformer's blocks as a configuration wants them: recomputed, compiled."""

from torch import nn

from modeling.layers import Transformer
from pretrain.config.sections import Train


def prepare_blocks(stage: nn.Module, train: Train) -> None:
    """Activation checkpointing and compilation of every Transformer's blocks, as configured."""
    for module in stage.modules():
        if isinstance(module, Transformer):
            module.checkpoint_every = train.activation_checkpointing
            if train.compile:
                for block in module.blocks:
                    block.compile(dynamic=False)
