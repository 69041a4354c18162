"""What the loop knows of a stage, and what every stage is made of.

A stage owns its models and turns a batch into a loss. Its loss for a micro-batch is its sum over tokens divided by the *step's* token
counts over all micro-batches and ranks (`token_counts`), so that gradients add up to the same whatever the number of ranks, rows or
accumulation steps. What is random in it is drawn from the rows' keys (`row_noise`), never from a generator's history.

Its parameters are what is trained, sharded and saved, made within `weights_on` (pretrain/engine/pieces.py); its buffers are saved with
them. Frozen models hide from DeepSpeed: they are held in plain objects, not registered as submodules, so they are neither sharded nor
optimised nor saved.

Shape letters: T packed tokens, B rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from modeling.layers import KeepsStatistics
from pretrain.checkpoint.read import load_weights
from pretrain.checkpoint.storage import Checkpoint


@dataclass(frozen=True)
class StageOutput:
    """Scalar loss of a micro-batch and (sum, weight) pairs of what is logged."""

    loss: Tensor
    metrics: dict[str, Tensor]


def row_noise(batch: Batch, channels: int, purpose: int = 0) -> Tensor:
    """Standard normal noise fp32 [T, channels], a function of each row's key alone: the same on every rank and in every run.

    Noise of another `purpose` is independent.
    """
    device = batch.tokens_T.device
    generator = torch.Generator(device)
    rows = []
    for key in batch.row_keys_B.tolist():
        generator.manual_seed(key ^ purpose)
        rows.append(torch.randn(batch.row_tokens, channels, generator=generator, device=device))
    return torch.cat(rows)


def weighted(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """(sum of values times weights, sum of weights), detached, for the log."""
    return torch.stack(((values_T.detach() * weights_T).sum(), weights_T.sum()))


@dataclass(frozen=True)
class Occasion:
    """A held-out evaluation at which a stage may write texts.

    Attributes:
        stage: with the EMA weights.
        call: calls a function of no arguments with all weights in place, on all ranks.
        is_main: whether this rank's texts are logged.
    """

    stage: Any
    config: Any
    manifest: Manifest
    call: Callable[[Callable[[], Any]], Any]
    is_main: bool


class Stage(KeepsStatistics):
    """What the loop knows of a stage: `token_counts` and `flops` of a batch, `forward`, and the number of the current step."""

    step = 0

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """Tokens that the loss is normalised by, by name, from the batch's metadata alone."""
        raise NotImplementedError(f"{type(self).__name__} must define token_counts(batch)")

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of the batch's forward and backward pass, for MFU; frozen models count their forward pass."""
        raise NotImplementedError(f"{type(self).__name__} must define flops(batch)")

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        """The micro-batch's part of the step's loss. In eval mode it is of the rows alone: no dropout, no dropped contexts, and noise keyed
        by the rows. Metrics are (sum, weight) pairs, on held-out rows logged as eval/NAME.
        """
        raise NotImplementedError

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """What an evaluation tells of the metrics' means over all its rows."""
        return means

    def load_first(self, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
        """Start from an earlier run's parameters and buffers, each read when it is asked for. Raises: UserError naming `source`."""
        self.load_trained(tensors, source)

    def load_trained(self, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
        """Take all parameters and buffers of a checkpoint or export, outside training. Raises: UserError naming `source`."""
        load_weights(self, tensors, source)


def ramp(step: int, warmup_steps: int) -> float:
    """Linear from 0 to 1 over the first `warmup_steps` steps."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
