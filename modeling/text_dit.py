"""TextDiT, stage 2 of TextLDM (arXiv 2605.07748): a standard DiT does flow matching on the latents of a frozen TextVAE.

Shape letters: T packed tokens, D width, Z latent dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .attention import Segments
from .flow import MIN_TIME, blind_floor, blind_velocity, data_from_velocity, velocity_from_data
from .layers import Transformer, initialize, time_embedding
from .token_posterior import TokenPosterior

MIN_PRIOR = 1e-9


@dataclass(kw_only=True)
class TextDiTConfig:
    """Shape of a TextDiT.

    Attributes:
        latent_dim: Z of the VAE.
        width, num_layers, head_dim: of the Transformer, 12 width^2 weights a layer.
        rope_theta: base of the rotary embedding; positions run over context and target together.
        qk_norm: LayerNorm of queries and keys per head.
        time_conditioning: "none" (the paper's appendix A), "additive" (an embedding added to the input) or "adaln_zero" (DiT's).
        role_embedding: add a learned vector that tells context from target tokens.
        prediction: what the network puts out: "velocity" (the paper), "data", "residual", the part of the velocity that the
            best linear predictor leaves, in units of its error (as in EDM, arXiv 2206.00364), or "posterior", what the context adds
            to the best predictor without context (token_posterior.py; for small vocabularies). The loss is the same flow loss.
        self_conditioning: the network also reads its own earlier estimate of z (arXiv 2208.04202). When there is none: zeros, or with
            posterior prediction the estimate without context, which it always reads.
        neighbour_heads: some heads start by looking at the tokens beside their own (layers.look_at).
        vocab_size: V of the VAE; read only with posterior prediction.
    """

    latent_dim: int = 64
    width: int = 768
    num_layers: int = 16
    head_dim: int = 64
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    time_conditioning: str = "none"
    role_embedding: bool = False
    prediction: str = "velocity"
    self_conditioning: bool = False
    neighbour_heads: bool = False
    vocab_size: int = 0

    def __post_init__(self) -> None:
        if self.time_conditioning not in ("none", "additive", "adaln_zero"):
            raise ValueError(f"time_conditioning {self.time_conditioning!r}: expected none, additive or adaln_zero")
        if self.neighbour_heads and self.qk_norm:
            raise ValueError(
                "neighbour_heads sets queries' and keys' biases, which qk_norm would normalise away: choose one"
            )
        if self.prediction not in ("velocity", "data", "residual", "posterior"):
            raise ValueError(f"prediction {self.prediction!r}: expected velocity, data, residual or posterior")


@dataclass(frozen=True)
class DiTOutput:
    """Velocity fp32 [T, Z], the Transformer's output [T, D] after its final norm, and with posterior prediction token logits [T, V]."""

    velocity_TZ: torch.Tensor
    hidden_TD: torch.Tensor
    logits_TV: torch.Tensor | None = None


class TextDiT(nn.Module):
    """Velocity of the noisy target tokens of packed windows, given the clean context tokens beside them."""

    def __init__(self, config: TextDiTConfig):
        super().__init__()
        self.config = config
        self.posterior = None
        if config.prediction == "posterior":
            self.posterior = TokenPosterior(config.width, config.latent_dim, config.vocab_size)
        self.reads_estimate = config.self_conditioning or self.posterior is not None
        self.from_latent = nn.Linear(config.latent_dim * (2 if self.reads_estimate else 1), config.width)
        self.role = nn.Embedding(2, config.width) if config.role_embedding else None
        self.time_mlp = None
        if config.time_conditioning != "none":
            self.time_mlp = nn.Sequential(
                nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
            )
        modulated = config.time_conditioning == "adaln_zero"
        self.transformer = Transformer(
            config.num_layers,
            config.width,
            config.head_dim,
            config.rope_theta,
            config.qk_norm,
            modulated,
            config.neighbour_heads,
        )
        self.to_latent = None
        if self.posterior is None:
            self.to_latent = nn.Linear(config.width, config.latent_dim)
            self.to_latent.zero_init = True  # type: ignore[assignment]
        initialize(self)

    def forward(
        self,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        time_T: torch.Tensor,
        windows: Segments,
        estimate_TZ: torch.Tensor | None = None,
        belief_scale: float = 1.0,
    ) -> torch.Tensor:
        """Predicted velocity, fp32 [T, Z]; only the target positions mean anything.

        Args:
            latents_TZ: standardised latents: z_t at targets, clean z at contexts, zeros at dropped contexts.
            is_target_T: bool [T].
            time_T: t of each token's window, [T]; not read by velocity prediction without time conditioning.
            windows: which tokens see each other: context and target of one document.
            estimate_TZ: an earlier estimate of z at the targets, for self-conditioning.
            belief_scale: in sampling with posterior prediction, see `TokenPosterior.forward`; nothing to others.
        """
        return self.outputs(latents_TZ, is_target_T, time_T, windows, estimate_TZ, belief_scale).velocity_TZ

    def outputs(
        self,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        time_T: torch.Tensor,
        windows: Segments,
        estimate_TZ: torch.Tensor | None = None,
        belief_scale: float = 1.0,
    ) -> DiTOutput:
        """The velocity and what else training looks at; arguments as in `forward`."""
        # A context token is clean: its own time is 0, whatever the time of the targets beside it.
        own_time_T = time_T * is_target_T
        if self.posterior is None:
            hidden_TD = self._hidden(latents_TZ, is_target_T, own_time_T, windows, estimate_TZ)
            return DiTOutput(self._velocity(hidden_TD, latents_TZ, time_T), hidden_TD)
        time_T1 = own_time_T[:, None].float()
        with torch.no_grad():
            unigram_TV = self.posterior.unigram_logits(latents_TZ, time_T1)
            alone = self.posterior.estimate(unigram_TV, latents_TZ, time_T1)
            # A dropped context, all zeros, tells nothing.
            dropped_T1 = (latents_TZ == 0).all(-1, keepdim=True)
            alone = alone._replace(deviation_TZ=alone.deviation_TZ.masked_fill(dropped_T1, 0))
            # An encoder's attention moves the latents of all that it sees at once together: a target's, and apart from them its context's.
            groups_T, num_groups = 2 * windows.ids_T + is_target_T, 2 * len(windows.lengths)
            context, target = self.posterior.offset(alone, groups_T, num_groups).alternate()
        given_TZ = alone.latents_TZ if estimate_TZ is None else estimate_TZ
        hidden_TD = self._hidden(latents_TZ, is_target_T, own_time_T, windows, given_TZ)
        # What the target leaves open of its own, the context may tell.
        hint_WZ = context.mean_GZ * (target.prior_GZ / context.prior_GZ.clamp_min(MIN_PRIOR)).sqrt()
        offset_WZ = target.mean_GZ + target.open_GZ * self.posterior.from_context(hint_WZ)
        rest_WZ = self.posterior.own_variance.float() + target.open_GZ * target.prior_GZ
        velocity_TZ, logits_TV = self.posterior(
            hidden_TD,
            unigram_TV,
            latents_TZ,
            time_T1,
            belief_scale,
            offset_WZ[windows.ids_T],
            rest_WZ[windows.ids_T],
            begins_target(is_target_T, windows),
        )
        return DiTOutput(velocity_TZ, hidden_TD, logits_TV)

    def _hidden(
        self,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        own_time_T: torch.Tensor,
        windows: Segments,
        estimate_TZ: torch.Tensor | None,
    ) -> torch.Tensor:
        inputs_TZ = latents_TZ
        if self.reads_estimate:
            # A context is its own estimate.
            estimate_TZ = torch.zeros_like(latents_TZ) if estimate_TZ is None else estimate_TZ
            inputs_TZ = torch.cat((latents_TZ, torch.where(is_target_T[:, None], estimate_TZ, latents_TZ)), dim=-1)
        dtype = self.from_latent.weight.dtype
        x_TD = self.from_latent(inputs_TZ.to(dtype))
        if self.role is not None:
            x_TD = x_TD + self.role(is_target_T.long())
        condition_TD = None
        if self.time_mlp is not None:
            condition_TD = self.time_mlp(time_embedding(own_time_T, self.config.width).to(dtype))
        if self.config.time_conditioning == "additive":
            x_TD, condition_TD = x_TD + condition_TD, None
        return self.transformer(x_TD, windows, condition_TD)

    def _velocity(self, hidden_TD: torch.Tensor, latents_TZ: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        assert self.to_latent is not None
        output_TZ = self.to_latent(hidden_TD).float()
        noisy_TZ, time_T1 = latents_TZ.float(), time_T[:, None].float()
        if self.config.prediction == "data":
            return velocity_from_data(noisy_TZ, output_TZ, time_T1)
        if self.config.prediction == "residual":
            return blind_velocity(noisy_TZ, time_T1) + blind_floor(time_T1).sqrt() * output_TZ
        return output_TZ

    def estimate(self, velocity_TZ: torch.Tensor, noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        """The one-step estimate of z that a velocity implies, with the same clamp of t as in data prediction."""
        return data_from_velocity(noisy_TZ.float(), velocity_TZ, time_T[:, None].float().clamp_min(MIN_TIME))


def begins_target(is_target_T: torch.Tensor, windows: Segments) -> torch.Tensor:
    """bool [T]: the first token of each target.

    What stands before it was encoded apart from it: it tells which token follows, but nothing of where in its token's Gaussian the
    latent lies. To the network it looks like any neighbour, and misleads it (docs/log.md: where the context gap was lost).
    """
    goes_on_T = is_target_T.roll(1) & (windows.positions_T > 0)
    return is_target_T & ~goes_on_T


class TokenHead(nn.Linear):
    """Logits of the target tokens from the hidden states, for an auxiliary cross-entropy where no posterior has logits; never exported."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)
        initialize(self)
