"""What both baselines over tokens have in common, beside their configuration: the figures and texts by which they are compared.

Shape letters: T packed tokens, W windows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.prompts import Prompt
from modeling.token_transformer import TokenTransformer
from pretrain.stages.base import Stage, StageOutput
from pretrain.stages.token_config import TokenRun
from pretrain.telemetry.flops import token_transformer_flops

HELDOUT_DRAWS = 4
"""Estimates of each window's nats that a held-out evaluation averages, where they are estimates."""


class TokenStage(Stage):
    """A TokenTransformer that gives probabilities to target tokens, given their contexts."""

    config: TokenRun
    model: TokenTransformer

    def window_nats(self, batch: Batch, num_draws: int) -> Tensor:
        """-log p of each window's targets given its context, or an unbiased estimate of a bound on it, float64 [W]; 0 without targets."""
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[Prompt], num_steps: int, seed: int = 0, tick: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """A continuation of the target's length for each prompt; `tick` is called `num_steps` times."""
        raise NotImplementedError

    def heldout(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        """What `forward` gives in eval mode: the nats of the targets."""
        total = self.window_nats(batch, HELDOUT_DRAWS).sum()
        weight = total.new_tensor(float(batch.num_tokens(SUFFIX)))
        return StageOutput(total.float() / counts["targets"], {"nats_per_token": torch.stack((total, weight))})

    def step_flops(self, batch: Batch, causal: bool) -> float:
        """Of a training step on the batch."""
        return token_transformer_flops(self.model.config, batch.window_lengths, causal)
