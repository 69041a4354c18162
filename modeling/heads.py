"""Heads of the TextDiT: from the Transformer's output to a velocity, and where a head knows tokens, their cross-entropy.

A head is a module with two methods. `alone` says what the noisy latents tell before the network has read them, or None; `forward` makes the
prediction. Time t is [T, 1], fp32, and 0 at contexts.

Shape letters: T packed tokens, D width, Z latent dim, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn

from .attention import Segments
from .layers import initialize


class TokenTargets(NamedTuple):
    """True tokens int64 [T] and the weight of each one's cross-entropy, fp32 [T]."""

    tokens_T: torch.Tensor
    weights_T: torch.Tensor


class Prediction(NamedTuple):
    """What a TextDiT puts out.

    Attributes:
        velocity_TZ: fp32.
        hidden_TD: the Transformer's output, after its final norm.
        token_loss: weighted sum of the true tokens' cross-entropies in nats, where a head knows tokens and was given the true ones.
        token_ce_T: each token's, without a gradient.
    """

    velocity_TZ: torch.Tensor
    hidden_TD: torch.Tensor
    token_loss: torch.Tensor | None = None
    token_ce_T: torch.Tensor | None = None


class VelocityHead(nn.Module):
    """The paper's: a linear map to the velocity."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.to_latent = nn.Linear(width, latent_dim)
        self.to_latent.zero_init = True  # type: ignore[assignment]

    def alone(
        self, latents_TZ: torch.Tensor, is_target_T: torch.Tensor, time_T1: torch.Tensor, windows: Segments
    ) -> None:
        """Nothing: all that it knows is in the network."""

    def forward(
        self,
        hidden_TD: torch.Tensor,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        alone: None,
        belief_scale: float,
        targets: TokenTargets | None,
    ) -> Prediction:
        """The velocity alone."""
        return Prediction(self.to_latent(hidden_TD).float(), hidden_TD)


class TokenHead(nn.Linear):
    """Logits of the target tokens from the hidden states, for an auxiliary cross-entropy where the head knows none; never exported."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)
        initialize(self)
