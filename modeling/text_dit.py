"""TextDiT, stage 2 of TextLDM (arXiv 2605.07748): a standard DiT does flow matching on the latents of a frozen TextVAE.

Shape letters: T packed tokens, M target tokens, D width, Z latent dim.
"""

import torch
from torch import nn

from .attention import Segments
from .flow import MIN_TIME, data_from_velocity
from .heads import CategoricalHead, Own, Prediction, TokenTargets, VelocityHead
from .layers import Transformer, initialize, time_embedding
from .shapes import TextDiTConfig


class TextDiT(nn.Module):
    """Velocity of the noisy target tokens of packed windows, given the clean context tokens beside them."""

    def __init__(self, config: TextDiTConfig):
        super().__init__()
        self.config = config
        width, latent_dim = config.width, config.latent_dim
        categorical = config.head == "categorical"
        self.reads_estimate = config.self_conditioning or categorical
        self.from_latent = nn.Linear(latent_dim * (2 if self.reads_estimate else 1), width)
        if categorical:  # z_t, which is mostly noise, beside what it tells by itself
            self.from_latent.zero_inputs = latent_dim  # type: ignore[assignment]
        self.embedding = nn.Embedding(config.vocab_size, width) if config.token_embedding else None
        self.role = nn.Embedding(2, width) if config.role_embedding else None
        self.time_mlp = None
        if config.time_conditioning != "none":
            self.time_mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.transformer = Transformer(
            config.num_layers,
            width,
            config.head_dim,
            config.rope_theta,
            config.qk_norm,
            config.time_conditioning == "adaln_zero",
            config.neighbour_heads,
        )
        self.head: VelocityHead | CategoricalHead
        if categorical:
            self.head = CategoricalHead(width, latent_dim, config.vocab_size)
        else:
            self.head = VelocityHead(width, latent_dim)
        initialize(self)

    def forward(
        self,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        time_T: torch.Tensor,
        windows: Segments,
        estimate_TZ: torch.Tensor | None = None,
        targets: TokenTargets | None = None,
        token_temperature: float = 1.0,
        places_M: torch.Tensor | None = None,
        own: Own | None = None,
    ) -> Prediction:
        """The velocity, and with the categorical head the cross-entropies of the true tokens.

        Args:
            latents_TZ: standardised latents: z_t at targets, clean z at contexts, zeros at dropped contexts.
            is_target_T: bool [T].
            time_T: t of each token, [T], in most models that of its window; the velocity head without time conditioning does not read it.
            windows: which tokens see each other: context and target of one document.
            estimate_TZ: an earlier estimate of z at the targets, for self-conditioning.
            targets: the true tokens and where they stand.
            token_temperature: of the tokens' probabilities; nothing to the velocity head.
            places_M: where targets stand, without their tokens. With neither a GPU is waited for, to find the places.
            own: what `alone` says of these latents, where it is known already.
        """
        if targets is not None:
            places_M = targets.places_M
        elif places_M is None:
            places_M = is_target_T.nonzero()[:, 0]
        tokens_M = None if targets is None else targets.tokens_M
        # fmt: off
        time_T1 = (time_T * is_target_T)[:, None].float()                    # [T, 1], a context's own time is 0
        if own is None and (estimate_TZ is None or self.embedding is not None):
            own = self.alone(latents_TZ, time_T1, places_M)                  # [T, Z], what z_t tells by itself, or None
        x_TD = self._embedded(latents_TZ, own, estimate_TZ, is_target_T)     # [T, Z] or [T, 2 Z] -> [T, D]
        x_TD, condition_TD = self._conditioned(x_TD, time_T1)                # [T, D], [T, D] or None
        hidden_TD = self.transformer(x_TD, windows, condition_TD)            # [T, D], after the final norm
        return self.head(hidden_TD, latents_TZ, time_T1, places_M, tokens_M, token_temperature)  # [T, D] -> [T, Z]
        # fmt: on

    def alone(self, latents_TZ: torch.Tensor, time_T1: torch.Tensor, places_M: torch.Tensor) -> Own | None:
        """What each latent tells by itself, where the head knows tokens; `time_T1` is 0 at contexts."""
        return self.head.alone(latents_TZ, time_T1, places_M, None if self.embedding is None else self.embedding.weight)

    def _embedded(
        self, latents_TZ: torch.Tensor, own: Own | None, estimate_TZ: torch.Tensor | None, is_target_T: torch.Tensor
    ) -> torch.Tensor:
        """Latents, and where it is read an estimate of z beside them: an earlier one, else what z_t tells by itself, else zeros. A context
        is its own estimate. An embedding of tokens is added.
        """
        if self.reads_estimate:
            if estimate_TZ is None:
                estimate_TZ = torch.zeros_like(latents_TZ) if own is None else own.estimate_TZ
            latents_TZ = torch.cat((latents_TZ, torch.where(is_target_T[:, None], estimate_TZ, latents_TZ)), dim=-1)
        x_TD = self.from_latent(latents_TZ.to(self.from_latent.weight.dtype))
        if own is not None and own.embedding_TD is not None:
            x_TD = x_TD + own.embedding_TD.to(x_TD)
        return x_TD if self.role is None else x_TD + self.role(is_target_T.long()).to(x_TD.device)

    def _conditioned(self, x_TD: torch.Tensor, time_T1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The time's embedding added, or beside for the blocks' modulation, or not at all."""
        if self.time_mlp is None:
            return x_TD, None
        time_TD = self.time_mlp(time_embedding(time_T1[:, 0], self.config.width).to(x_TD.dtype))
        return (
            (x_TD + time_TD.to(x_TD.device), None) if self.config.time_conditioning == "additive" else (x_TD, time_TD)
        )

    def estimate(self, velocity_TZ: torch.Tensor, noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        """The one-step estimate of z that a velocity implies, with t clamped to `MIN_TIME` from below."""
        return data_from_velocity(noisy_TZ.float(), velocity_TZ, time_T[:, None].float().clamp_min(MIN_TIME))
