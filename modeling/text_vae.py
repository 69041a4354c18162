"""TextVAE, stage 1 of TextLDM (arXiv 2605.07748): every token becomes one continuous latent, all tokens are decoded in parallel.

Shape letters: T packed tokens, D width, Z latent dim, V vocabulary, F teacher features.
"""

import torch
from torch import nn

from .attention import Segments
from .layers import KeepsStatistics, Transformer, initialize
from .shapes import TextVAEConfig

STATISTICS = ("latents_mean", "latents_std")
"""Buffers that stage 2 measures."""


class TextVAE(KeepsStatistics):
    """Token ids -> diagonal Gaussian posterior per token -> token logits.

    The buffers `latents_mean` and `latents_std` [Z] standardise posterior means per channel for the flow (AutoencoderKL's names);
    they are 0 and 1 until stage 2 has measured them (pretrain/stages/latent_statistics.py).
    """

    latents_mean: torch.Tensor
    latents_std: torch.Tensor

    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.config = config
        stack = (config.width, config.head_dim, config.rope_theta, config.qk_norm)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.encoder = Transformer(config.num_encoder_layers, *stack)
        self.to_mean = nn.Linear(config.width, config.latent_dim)
        self.to_log_variance = nn.Linear(config.width, config.latent_dim)
        self.to_log_variance.zero_init = True  # type: ignore[assignment]
        self.from_latent = nn.Linear(config.latent_dim, config.width)
        self.decoder = Transformer(config.num_decoder_layers, *stack)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.register_buffer("latents_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latents_std", torch.ones(config.latent_dim))
        initialize(self)

    def encode(self, tokens_T: torch.Tensor, segments: Segments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Posterior of every token, seen with its segment alone.

        Returns: mean [T, Z] and log-variance [T, Z] in fp32, clamped to [-20, 10]; the encoder's output [T, D] after its final norm,
        which is REPA's site.
        """
        hidden_TD = self.encoder(self.embedding(tokens_T), segments)
        mean_TZ = self.to_mean(hidden_TD).float()
        log_variance_TZ = self.to_log_variance(hidden_TD).float().clamp(-20.0, 10.0)
        return mean_TZ, log_variance_TZ, hidden_TD

    def decode(self, latents_TZ: torch.Tensor, segments: Segments) -> torch.Tensor:
        """Unstandardised latents [T, Z] -> the decoder's output [T, D] after its final norm; `lm_head` makes logits of it."""
        return self.decoder(self.from_latent(latents_TZ.to(self.from_latent.weight.dtype)), segments)

    def decode_tokens(self, latents_TZ: torch.Tensor, segments: Segments, chunk: int = 4096) -> torch.Tensor:
        """The most likely token [T] of every *standardised* latent [T, Z], in one parallel pass."""
        hidden_TD = self.decode(self.unstandardize(latents_TZ), segments)
        return torch.cat([self.lm_head(part).argmax(-1) for part in hidden_TD.split(chunk)])

    def standardize(self, latents_TZ: torch.Tensor) -> torch.Tensor:
        """Zero mean and unit variance per channel, in fp32."""
        return (latents_TZ.to(self.latents_mean) - self.latents_mean) / self.latents_std

    def unstandardize(self, latents_TZ: torch.Tensor) -> torch.Tensor:
        """The inverse of `standardize`."""
        return latents_TZ.to(self.latents_mean) * self.latents_std + self.latents_mean
