"""A TextVAE alone as a Hugging Face model: rows of tokens to latents, and back.

Shape letters: B rows, L tokens of a padded row, T tokens of all rows, Z latent dim.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from .attention import Segments
from .conventions import row_texts
from .pretrained import ExportedModel
from .text_vae import TextVAE, TextVAEConfig


@dataclass
class Latents(ModelOutput):
    """Of rows of tokens, fp32, zeros at padding.

    Attributes:
        latents: means of the posterior, standardised where its statistics were measured (a VAE alone has none: 0 and 1), [B, L, Z].
        log_variance: of the posterior, before standardisation, [B, L, Z].
    """

    latents: Any = None
    log_variance: Any = None


class TextVAEModelConfig(PretrainedConfig):
    """Its shape, and whose tokens it reads.

    Attributes:
        vae: fields of TextVAEConfig.
        tokenizer_sha256: of tokenizer.json, by which a run of stage 2 knows that its data has the same.
    """

    model_type = "textvae"

    def __init__(self, vae: dict[str, Any] | None = None, tokenizer_sha256: str = "", **kwargs: Any):
        self.vae = vae or dataclasses.asdict(TextVAEConfig(vocab_size=256, latent_dim=8, width=64, head_dim=64))
        self.tokenizer_sha256 = tokenizer_sha256
        super().__init__(**kwargs)


class TextVAEModel(ExportedModel):
    """Tokens in, one latent each out; `decode` gives the tokens back."""

    config_class = TextVAEModelConfig
    config: TextVAEModelConfig
    vae: TextVAE

    def __init__(self, config: TextVAEModelConfig):
        super().__init__(config, vae=TextVAE(TextVAEConfig(**config.vae)))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any) -> Latents:
        """Latents of rows of tokens, each encoded by itself. Raises: ValueError for a mask that does not fit."""
        device = self.vae.latents_mean.device
        mask_BL = _mask(input_ids, attention_mask).to(device)
        latents_BLZ = torch.zeros(*input_ids.shape, self.vae.config.latent_dim, device=device)
        log_variance_BLZ = latents_BLZ.clone()
        texts = [ids_T for ids_T in row_texts(input_ids, attention_mask) if len(ids_T)]
        if texts:
            mean_TZ, log_variance_TZ, _hidden = self.vae.encode(
                torch.cat(texts).to(device), Segments.from_lengths([len(ids_T) for ids_T in texts], device)
            )
            latents_BLZ[mask_BL] = self.vae.standardize(mean_TZ)
            log_variance_BLZ[mask_BL] = log_variance_TZ
        return Latents(latents_BLZ, log_variance_BLZ)

    @torch.no_grad()
    def decode(self, latents_BLZ: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The most likely tokens int64 [B, L] of such latents, 0 at padding."""
        mask_BL = _mask(latents_BLZ[..., 0], attention_mask).to(latents_BLZ.device)
        tokens_BL = torch.zeros(mask_BL.shape, dtype=torch.int64, device=latents_BLZ.device)
        lengths = [length for length in mask_BL.sum(1).tolist() if length]
        if lengths:
            segments = Segments.from_lengths(lengths, latents_BLZ.device)
            tokens_BL[mask_BL] = self.vae.decode_tokens(latents_BLZ[mask_BL], segments)
        return tokens_BL


def _mask(like_BL: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    return torch.ones_like(like_BL, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
