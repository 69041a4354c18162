"""TextDiT, stage 2 of TextLDM (arXiv 2605.07748): a standard DiT does flow matching on the latents of a frozen TextVAE.

Shape letters: T packed tokens, D width, Z latent dim.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .attention import Segments
from .flow import MIN_TIME, blind_floor, blind_velocity, data_from_velocity, time_embedding, velocity_from_data
from .layers import Transformer, initialize


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
        prediction: what the network puts out: "velocity" (the paper), "data", or "residual", the part of the velocity that the
            best linear predictor leaves, in units of its error (as in EDM, arXiv 2206.00364). The loss is the same flow loss.
        self_conditioning: the network also reads its own earlier estimate of z (arXiv 2208.04202); zeros when there is none.
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

    def __post_init__(self) -> None:
        if self.time_conditioning not in ("none", "additive", "adaln_zero"):
            raise ValueError(f"time_conditioning {self.time_conditioning!r}: expected none, additive or adaln_zero")
        if self.prediction not in ("velocity", "data", "residual"):
            raise ValueError(f"prediction {self.prediction!r}: expected velocity, data or residual")


class TextDiT(nn.Module):
    """Velocity of the noisy target tokens of packed windows, given the clean context tokens beside them."""

    def __init__(self, config: TextDiTConfig):
        super().__init__()
        self.config = config
        inputs = config.latent_dim * (2 if config.self_conditioning else 1)
        self.from_latent = nn.Linear(inputs, config.width)
        self.role = nn.Embedding(2, config.width) if config.role_embedding else None
        self.time_mlp = None
        if config.time_conditioning != "none":
            self.time_mlp = nn.Sequential(
                nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
            )
        modulated = config.time_conditioning == "adaln_zero"
        self.transformer = Transformer(
            config.num_layers, config.width, config.head_dim, config.rope_theta, config.qk_norm, modulated
        )
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
    ) -> torch.Tensor:
        """Predicted velocity, fp32 [T, Z]; only the target positions mean anything.

        Args:
            latents_TZ: standardised latents: z_t at targets, clean z at contexts, zeros at dropped contexts.
            is_target_T: bool [T].
            time_T: t of each token's window, [T]; read only with time conditioning, data or residual prediction.
            windows: which tokens see each other: context and target of one document.
            estimate_TZ: an earlier estimate of z at the targets, for self-conditioning.
        """
        return self.velocity(self.hidden(latents_TZ, is_target_T, time_T, windows, estimate_TZ), latents_TZ, time_T)

    def hidden(
        self,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        time_T: torch.Tensor,
        windows: Segments,
        estimate_TZ: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The Transformer's output [T, D] after its final norm; arguments as in `forward`."""
        inputs_TZ = latents_TZ
        if self.config.self_conditioning:
            estimate_TZ = torch.zeros_like(latents_TZ) if estimate_TZ is None else estimate_TZ
            inputs_TZ = torch.cat((latents_TZ, estimate_TZ * is_target_T[:, None]), dim=-1)
        dtype = self.from_latent.weight.dtype
        x_TD = self.from_latent(inputs_TZ.to(dtype))
        if self.role is not None:
            x_TD = x_TD + self.role(is_target_T.long())
        condition_TD = None
        if self.time_mlp is not None:
            # A context token is clean: its own time is 0, whatever the time of the targets beside it.
            condition_TD = self.time_mlp(time_embedding(time_T * is_target_T, self.config.width).to(dtype))
        if self.config.time_conditioning == "additive":
            x_TD, condition_TD = x_TD + condition_TD, None
        return self.transformer(x_TD, windows, condition_TD)

    def velocity(self, hidden_TD: torch.Tensor, latents_TZ: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        """The velocity fp32 [T, Z] that the output at `hidden_TD` stands for."""
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


class TokenHead(nn.Linear):
    """Logits of the target tokens from the DiT's hidden states, for an auxiliary cross-entropy in training; left out of every export."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)
        initialize(self)
