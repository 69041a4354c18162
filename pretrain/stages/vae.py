"""The two stages: each owns its models and turns a batch into a loss. Nothing else differs between training a VAE and a DiT.

A stage's loss for a micro-batch is its sum over tokens divided by the *step's* token counts over all micro-batches and ranks, so
that gradients add up to the same whatever the number of ranks, rows or accumulation steps. Frozen models hide from DeepSpeed:
they are not registered as submodules, so they are neither sharded nor optimised nor saved.

Shape letters: T packed tokens, B rows, D width, Z latent dim, F teacher features, W windows.
"""

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import STRICT, Section
from data_pipeline.features.cache import load_cache
from data_pipeline.features.codec import FeatureCodec
from data_pipeline.features.settings import Repa
from data_pipeline.features.teacher import check_same_tokenizer, load_teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch
from modeling import losses
from modeling.attention import Segments
from modeling.repa import RepaHead
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.config import checks
from pretrain.config.registry import StageKind
from pretrain.config.schema import RunConfig, inherited
from pretrain.stages.base import Stage, StageOutput, ramp, row_noise, weighted
from pretrain.telemetry.flops import transformer_flops


@pydantic_dataclass(config=STRICT, kw_only=True)
class VAEModel(TextVAEConfig):
    """The TextVAE's architecture (modeling/text_vae.py)."""

    vocab_size: NonNegativeInt = 0
    """Rows of embedding and head, at least the tokenizer's size; 0: the size that the data's manifest names."""

    def architecture(self) -> TextVAEConfig:
        """The plain dataclass of modeling, which exported folders carry."""
        return TextVAEConfig(**inherited(self, TextVAEConfig))


class KL(Section):
    """The VAE's posterior against the unit Gaussian (stage 1)."""

    weight: NonNegativeFloat = 1e-3
    """beta of the loss [paper: 1e-3]."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the weight rises linearly from 0."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over channels; always averaged over tokens. mean is latent_dim times weaker."""


class VAERun(RunConfig):
    """Stage 1: the TextVAE."""

    stage: Literal["vae"]
    """Which model is trained."""
    model: VAEModel
    repa: Repa = Repa()
    kl: KL = KL()

    def features_folder(self) -> str | None:
        return self.repa.features if self.repa.weight else None

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        checks.check_heads("model", self.model.width, self.model.head_dim)
        if self.data.split.kind == "context":
            raise ValueError("data.split.kind is context, which is stage dit's; stage vae takes truncate or none")
        if self.repa.features and self.repa.online_teacher:
            raise ValueError(
                "repa.features and repa.online_teacher are both set; drop one: a teacher is cached or online"
            )
        if self.repa.weight and not (self.repa.features or self.repa.online_teacher):
            raise ValueError(
                f"repa.weight is {self.repa.weight:g}, but no teacher is named; set repa.features (a folder that"
                " textldm cache wrote) or repa.online_teacher, or repa.weight=0 to train without"
            )
        return self


class VAEStage(Stage):
    """L_VAE = L_CE + beta D_KL + lambda L_REPA (TextLDM, stage 1).

    Every token is reconstructed. REPA covers the tokens of PREFIX segments: a causal teacher's features of a prefix are exact under
    truncation, those of a suffix were made with text that the encoder does not see.
    """

    def __init__(self, config: VAERun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        shape = config.model.architecture()
        shape.vocab_size = shape.vocab_size or manifest.tokenizer.vocab_size
        if shape.vocab_size < manifest.tokenizer.vocab_size:
            raise UserError(
                f"model.vocab_size is {shape.vocab_size}, but {config.data.path} has tokens up to"
                f" {manifest.tokenizer.vocab_size - 1}: expected at least {manifest.tokenizer.vocab_size}; 0 takes it from the data"
            )
        self.vae = TextVAE(shape)
        self.repa: RepaHead | None = None
        self._frozen: dict[str, Any] = {}
        if features := config.features_folder():
            self._frozen["codec"] = load_cache(features, manifest).codec.to(device)
            feature_dim = self._frozen["codec"].feature_dim
        elif config.repa.weight and config.repa.online_teacher:
            check_same_tokenizer(config.repa.online_teacher, config.repa.online_revision, config.data.path, manifest)
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            teacher = load_teacher(
                config.repa.online_teacher, config.repa.layer, config.repa.online_revision, dtype=dtype
            )
            self._frozen["teacher"] = teacher.to(device)
            feature_dim = teacher.feature_dim
        if self._frozen:
            self.repa = RepaHead(shape.width, feature_dim)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`tokens`: all but filler. `aligned`: those with a REPA target."""
        return {"tokens": batch.num_tokens(PREFIX, SUFFIX), "aligned": batch.num_tokens(PREFIX)}

    def flops(self, batch: Batch) -> float:
        shape = self.vae.config
        layers = shape.num_encoder_layers + shape.num_decoder_layers
        weights = 12 * shape.width**2 * layers + shape.width * (3 * shape.latent_dim + shape.vocab_size)
        return transformer_flops(weights, layers, shape.width, batch.segment_lengths)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        vae, segments = self.vae, Segments.from_lengths(batch.segment_lengths, batch.tokens_T.device)
        roles_T = batch.roles_T.to(batch.tokens_T.device, non_blocking=True)
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
        if self.repa is not None:
            aligned_T = (roles_T == PREFIX).float()
            directions_TF = self._directions(batch)
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

    def _directions(self, batch: Batch) -> Tensor:
        """The teacher's features over their norms [T, F]; those of a lossy codec as it gives them, see RepaHead."""
        codec = self._frozen.get("codec")
        if codec is None:
            return F.normalize(self._online_features(batch).float(), dim=-1)
        decoded_TF = codec.decode(batch.features, batch.tokens_T, batch.window_lengths)
        return decoded_TF if isinstance(codec, FeatureCodec) else F.normalize(decoded_TF, dim=-1)

    def _online_features(self, batch: Batch) -> Tensor:
        filler = {w for w, role in zip(batch.segment_windows, batch.segment_roles) if role == FILLER}
        wanted = [w not in filler for w in range(len(batch.window_lengths))]
        return self._frozen["teacher"].features(batch.tokens_T, batch.window_lengths, wanted).clone()


KIND = StageKind(config=VAERun, stage=VAEStage)
