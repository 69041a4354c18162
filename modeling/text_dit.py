"""TextDiT, stage 2 of TextLDM (arXiv 2605.07748): a standard DiT does flow matching on the latents of a frozen TextVAE.

Shape letters: T packed tokens, D width, Z latent dim.
"""

import torch
from torch import nn

from .attention import Segments
from .flow import MIN_TIME, data_from_velocity
from .heads import Prediction, TokenTargets, VelocityHead
from .layers import Transformer, initialize, time_embedding
from .shapes import TextDiTConfig
from .token_posterior import PosteriorHead


class TextDiT(nn.Module):
    """Velocity of the noisy target tokens of packed windows, given the clean context tokens beside them."""

    def __init__(self, config: TextDiTConfig):
        super().__init__()
        self.config = config
        width, latent_dim = config.width, config.latent_dim
        with_posterior = config.prediction == "posterior"
        self.reads_estimate = config.self_conditioning or with_posterior
        self.from_latent = nn.Linear(latent_dim * (2 if self.reads_estimate else 1), width)
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
        self.head: VelocityHead | PosteriorHead
        if with_posterior:
            self.head = PosteriorHead(width, latent_dim, config.vocab_size)
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
        belief_scale: float = 1.0,
        targets: TokenTargets | None = None,
    ) -> Prediction:
        """The velocity, of which only the target positions mean anything, and what training reads beside it.

        Args:
            latents_TZ: standardised latents: z_t at targets, clean z at contexts, zeros at dropped contexts.
            is_target_T: bool [T].
            time_T: t of each token's window, [T]; not read by velocity prediction without time conditioning.
            windows: which tokens see each other: context and target of one document.
            estimate_TZ: an earlier estimate of z at the targets, for self-conditioning.
            belief_scale: in sampling with posterior prediction, see `TokenPosterior.forward`; nothing to others.
            targets: the true tokens, if their cross-entropy is wanted.
        """
        time_T1 = (time_T * is_target_T)[
            :, None
        ].float()  #                            [T, 1], a context's own time is 0
        alone = self.head.alone(latents_TZ, is_target_T, time_T1, windows)  #           what each z_t tells by itself
        given_TZ = estimate_TZ if estimate_TZ is not None or alone is None else alone.latents_TZ  # [T, Z], or None
        x_TD = self._embedded(latents_TZ, is_target_T, given_TZ)  #                     [T, Z] or [T, 2 Z] -> [T, D]
        condition_TD = self._condition(time_T1)  #                                      [T, 1] -> [T, D], or None
        if condition_TD is not None and self.config.time_conditioning == "additive":
            x_TD, condition_TD = x_TD + condition_TD, None
        hidden_TD = self.transformer(x_TD, windows, condition_TD)  #                    [T, D], after the final norm
        return self.head(hidden_TD, latents_TZ, time_T1, alone, belief_scale, targets)  # [T, D] -> [T, Z]

    def _embedded(
        self, latents_TZ: torch.Tensor, is_target_T: torch.Tensor, given_TZ: torch.Tensor | None
    ) -> torch.Tensor:
        """Latents, and where it is read the estimate of z beside them; a context is its own estimate."""
        if self.reads_estimate:
            given_TZ = torch.zeros_like(latents_TZ) if given_TZ is None else given_TZ
            latents_TZ = torch.cat((latents_TZ, torch.where(is_target_T[:, None], given_TZ, latents_TZ)), dim=-1)
        x_TD = self.from_latent(latents_TZ.to(self.from_latent.weight.dtype))
        return x_TD if self.role is None else x_TD + self.role(is_target_T.long())

    def _condition(self, time_T1: torch.Tensor) -> torch.Tensor | None:
        if self.time_mlp is None:
            return None
        return self.time_mlp(time_embedding(time_T1[:, 0], self.config.width).to(self.from_latent.weight.dtype))

    def estimate(self, velocity_TZ: torch.Tensor, noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        """The one-step estimate of z that a velocity implies, with t clamped to `MIN_TIME` from below."""
        return data_from_velocity(noisy_TZ.float(), velocity_TZ, time_T[:, None].float().clamp_min(MIN_TIME))
