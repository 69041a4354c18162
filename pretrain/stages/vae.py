"""Stage 1: the TextVAE learns to give back every token, its encoder aligned with a frozen language model (TextLDM).

Shape letters: T packed tokens, D width, Z latent dim, F teacher features.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch
from modeling import losses
from modeling.attention import Segments
from modeling.repa import RepaHead
from modeling.text_vae import TextVAE
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import renamed
from pretrain.engine.pieces import weights_on
from pretrain.stages.base import Stage, StageOutput, ramp, row_noise, weighted
from pretrain.stages.repa_target import RepaTarget, repa_target
from pretrain.stages.vae_config import VAERun
from pretrain.stages.vocabulary import vocab_size_of
from pretrain.telemetry.flops import vae_flops


class VAEStage(Stage):
    """L_VAE = L_CE + beta D_KL + lambda L_REPA (TextLDM, stage 1).

    Every token is reconstructed. REPA covers the tokens of PREFIX segments: a causal teacher's features of a prefix are exact under
    truncation, those of a suffix were made with text that the encoder does not see.
    """

    def __init__(self, config: VAERun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        shape = config.model.architecture()
        shape.vocab_size = vocab_size_of(shape.vocab_size, manifest, config.data.path)
        self.target: RepaTarget | None = repa_target(config, manifest, device)
        with weights_on(device):
            self.vae = TextVAE(shape)
            self.repa = RepaHead(shape.width, self.target.feature_dim) if self.target else None

    def load_trained(self, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
        """Without the REPA projection if the teacher that it was trained with is not at hand now."""
        if self.repa is None:
            tensors = renamed(tensors, {name: name for name in tensors if not name.startswith("repa.")})
        super().load_trained(tensors, source)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`tokens`: all but filler. `aligned`: those with a REPA target."""
        return {"tokens": batch.num_tokens(PREFIX, SUFFIX), "aligned": batch.num_tokens(PREFIX)}

    def flops(self, batch: Batch) -> float:
        return vae_flops(self.vae.config, batch.segment_lengths)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        vae, segments = self.vae, Segments.from_lengths(batch.segment_lengths, batch.tokens_T.device)
        roles_T = batch.roles_T
        real_T = (roles_T != FILLER).float()
        mean_TZ, log_variance_TZ, hidden_TD = vae.encode(batch.tokens_T, segments)
        latents_TZ = mean_TZ
        if self.training:
            latents_TZ = mean_TZ + (0.5 * log_variance_TZ).exp() * row_noise(batch, mean_TZ.shape[1])
        decoded_TD = vae.decode(latents_TZ, segments)
        ce_sum, correct_T = losses.linear_cross_entropy(decoded_TD, vae.lm_head.weight, batch.tokens_T, real_T)
        kl_TZ = losses.kl_to_standard_normal(mean_TZ, log_variance_TZ)
        kl_T = kl_TZ.sum(-1) if self.config.kl.reduction == "sum" else kl_TZ.mean(-1)
        beta = self.config.kl.weight * ramp(self.step, self.config.kl.warmup_steps)
        loss = (ce_sum + beta * (kl_T * real_T).sum()) / counts["tokens"]
        metrics = {
            "ce": torch.stack((ce_sum.detach(), real_T.sum())),
            "token_accuracy": weighted(correct_T, real_T),
            "kl_per_token": weighted(kl_TZ.sum(-1), real_T),
            "posterior_variance": weighted(log_variance_TZ.exp().mean(-1), real_T),
            "mean_square": weighted(mean_TZ.square().mean(-1), real_T),
        }
        if self.repa is not None and self.target is not None:
            aligned_T = (roles_T == PREFIX).float()
            directions_TF = self.target.directions(batch)
            cosine_T = self.repa(hidden_TD, directions_TF)
            weight = self.config.repa.weight * ramp(self.step, self.config.repa.warmup_steps)
            loss = loss - weight * (cosine_T * aligned_T).sum() / max(counts["aligned"], 1)
            # Positions half a batch away: what arbitrary pairs reach (docs/diagnosis.md, check 4).
            with torch.no_grad():
                shuffled_T = self.repa(hidden_TD.detach(), directions_TF.roll(len(directions_TF) // 2, 0))
            both_T = aligned_T * aligned_T.roll(len(aligned_T) // 2)
            metrics["repa_cosine"] = weighted(cosine_T, aligned_T)
            metrics["repa_cosine_excess"] = weighted(cosine_T - shuffled_T, both_T)
        return StageOutput(loss, metrics)
