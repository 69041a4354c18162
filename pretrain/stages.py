"""The two stages: each owns its models and turns a batch into a loss. Nothing else differs between training a VAE and a DiT.

A stage's loss for a micro-batch is its sum over tokens divided by the *step's* token counts over all micro-batches and ranks, so
that gradients add up to the same whatever the number of ranks, rows or accumulation steps. Frozen models hide from DeepSpeed:
they are not registered as submodules, so they are neither sharded nor optimised nor saved.

Shape letters: T packed tokens, B rows, D width, Z latent dim, F teacher features, W windows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import FILLER, PREFIX, SUFFIX, Batch
from data_pipeline.codec import FeatureCodec
from data_pipeline.errors import UserError
from data_pipeline.feature_cache import load_cache
from data_pipeline.manifest import Manifest
from data_pipeline.teacher import check_same_tokenizer, load_teacher
from modeling import flow, losses
from modeling.attention import Segments
from modeling.floors import NAMES as FLOOR_NAMES
from modeling.floors import Floors
from modeling.layers import Transformer
from modeling.repa import RepaHead
from modeling.text_dit import TextDiT, TokenHead
from modeling.text_vae import TextVAE
from pretrain.config import DiTRun, RunConfig, VAERun, features_folder, times_of
from pretrain.config_sections import Train
from pretrain.distributed import barrier
from pretrain.latents import LATENTS_NAME, load_vae, measured_latents, posterior_mean, read_latents, read_posterior
from pretrain.telemetry import transformer_flops

QUARTERS = 4
TIME_NOISE, POSTERIOR_NOISE = 1, 2
"""Purposes of keyed noise beside the flow's own: the spread of times over a window's tokens, and draws from the VAE's posterior."""


@dataclass(frozen=True)
class StageOutput:
    """Scalar loss of a micro-batch and (sum, weight) pairs of what is logged."""

    loss: Tensor
    metrics: dict[str, Tensor]


def row_noise(batch: Batch, channels: int, purpose: int = 0) -> Tensor:
    """Standard normal noise fp32 [T, channels], a function of each row's key alone: the same on every rank and in every run.

    Noise of another `purpose` is independent.
    """
    device = batch.tokens_T.device
    generator = torch.Generator(device)
    rows = []
    for key in batch.row_keys_B.tolist():
        generator.manual_seed(key ^ purpose)
        rows.append(torch.randn(batch.row_tokens, channels, generator=generator, device=device))
    return torch.cat(rows)


def weighted(values_T: Tensor, weights_T: Tensor) -> Tensor:
    """(sum of values times weights, sum of weights), detached, for the log."""
    return torch.stack(((values_T.detach() * weights_T).sum(), weights_T.sum()))


class Stage(nn.Module):
    """What the loop knows of a stage: `token_counts` and `flops` of a batch, `forward`, and the number of the current step."""

    step = 0

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """Tokens that the loss is normalised by, by name, from the batch's metadata alone."""
        raise NotImplementedError

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of the batch's forward and backward pass; frozen models count their forward pass."""
        raise NotImplementedError

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        """The micro-batch's part of the step's loss. In eval mode nothing is random."""
        raise NotImplementedError


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
        if features := features_folder(config):
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


@dataclass(frozen=True)
class FlowErrors:
    """Flow loss per token (mean over channels) at the times `time_T`; `weights_T` is 1 at targets."""

    error_T: Tensor
    weights_T: Tensor
    time_T: Tensor
    floors: Floors
    token_ce: Tensor | None = None

    def loss(self, token_weight: float) -> Tensor:
        """Sum over the target tokens, with the token cross-entropy's share."""
        total = (self.error_T * self.weights_T).sum()
        return total if self.token_ce is None else total + token_weight * self.token_ce

    def metrics(self) -> dict[str, Tensor]:
        """The loss, and it per quarter of t beside the three floors at the very same times."""
        metrics = {"flow": weighted(self.error_T, self.weights_T)}
        if self.token_ce is not None:
            metrics["token_ce"] = torch.stack((self.token_ce.detach(), self.weights_T.sum()))
        quarter_T = (self.time_T * QUARTERS).long().clamp(0, QUARTERS - 1)
        floors = self.floors.at(self.time_T)
        for quarter in range(QUARTERS):
            weights_T = self.weights_T * (quarter_T == quarter)
            metrics[f"flow_q{quarter + 1}"] = weighted(self.error_T, weights_T)
            for name in FLOOR_NAMES:
                metrics[f"{name}_floor_q{quarter + 1}"] = weighted(floors[name], weights_T)
        return metrics


class DiTStage(Stage):
    """L_FM = E || v(z_t, z_c) - v* ||^2 on the target tokens of a frozen VAE's latents (TextLDM, stage 2), per channel."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: DiTRun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        vae = load_vae(config.model.vae, manifest).to(device)
        if vae.config.latent_dim != config.model.latent_dim:
            raise UserError(
                f"model.latent_dim is {config.model.latent_dim}, but the VAE in {config.model.vae} has latent_dim"
                f" {vae.config.latent_dim}: set model.latent_dim={vae.config.latent_dim}, or name another VAE"
            )
        if not dist.is_initialized() or dist.get_rank() == 0:
            measured_latents(vae, config, manifest, device)
        barrier()
        floors = read_latents(config.run_folder / LATENTS_NAME, vae).to(device)
        self._frozen: dict[str, Any] = {"vae": vae, "floors": floors}
        shape = config.model.architecture()
        shape.vocab_size = vae.config.vocab_size
        self.dit = TextDiT(shape)
        if self.dit.posterior is not None:
            read_posterior(config.run_folder / LATENTS_NAME, self.dit.posterior)
        self.token_head: TokenHead | None = None
        if config.flow.token_loss_weight and self.dit.posterior is None:
            self.token_head = TokenHead(config.model.width, vae.config.vocab_size)
        # Part of the checkpoint, so that an export needs nothing but it.
        self.register_buffer("latents_mean", vae.latents_mean.clone())
        self.register_buffer("latents_std", vae.latents_std.clone())
        self.times = times_of(config.flow, config.model.latent_dim)

    @property
    def vae(self) -> TextVAE:
        """The frozen VAE."""
        return self._frozen["vae"]

    @property
    def floors(self) -> Floors:
        """What predictors without language reach on this VAE's latents."""
        return self._frozen["floors"]

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`targets`: tokens whose velocity is learned."""
        return {"targets": batch.num_tokens(SUFFIX)}

    def flops(self, batch: Batch) -> float:
        shape, vae = self.config.model, self.vae.config
        weights = 12 * shape.width**2 * shape.num_layers + 2 * shape.width * shape.latent_dim
        if shape.prediction == "posterior":
            weights += vae.vocab_size * (shape.width + 3 * shape.latent_dim)
        own = transformer_flops(
            weights,
            shape.num_layers,
            shape.width,
            batch.window_lengths,
        )
        encoder = 12 * vae.width**2 * vae.num_encoder_layers
        return own + transformer_flops(encoder, vae.num_encoder_layers, vae.width, batch.segment_lengths, passes=1)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        latents_TZ = self.latents(batch)
        if self.training:
            time_W = self.times.quantile(batch.window_uniforms_W2[:, 0])
            keep_context_W = batch.window_uniforms_W2[:, 1] >= self.config.flow.context_drop
            result = self.flow_errors(batch, latents_TZ, latents_TZ, time_W, keep_context_W)
            return StageOutput(result.loss(self.config.flow.token_loss_weight) / counts["targets"], result.metrics())
        results = [self.heldout_flow(batch, latents_TZ, latents_TZ, quarter) for quarter in range(QUARTERS)]
        found = [result.metrics() for result in results]
        metrics = {name: torch.stack([pairs[name] for pairs in found]).sum(0) for name in found[0]}
        total = torch.stack([result.loss(0.0) for result in results]).mean()
        return StageOutput(total / counts["targets"], metrics)

    def heldout_flow(self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, quarter: int) -> "FlowErrors":
        """Errors with every window at one time of a quarter of [0, 1], uniformly, always with a context."""
        time_W = (batch.window_uniforms_W2[:, 0] + quarter) / QUARTERS
        return self.flow_errors(batch, latents_TZ, context_TZ, time_W, torch.ones_like(time_W, dtype=torch.bool))

    def latents(self, batch: Batch) -> Tensor:
        """Standardised latents fp32 [T, Z], context and target of a window encoded separately."""
        mean_TZ = posterior_mean(self.vae, batch)
        if self.config.flow.target == "sample" and self.training:
            segments = Segments.from_lengths(batch.segment_lengths, mean_TZ.device)
            with torch.no_grad():
                log_variance_TZ = self.vae.encode(batch.tokens_T, segments)[1]
            noise_TZ = row_noise(batch, mean_TZ.shape[1], purpose=POSTERIOR_NOISE)
            mean_TZ = mean_TZ + (0.5 * log_variance_TZ).exp() * noise_TZ
        return self.vae.standardize(mean_TZ)

    def flow_errors(
        self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, time_W: Tensor, keep_context_W: Tensor
    ) -> "FlowErrors":
        """Squared error of the velocity per token, at one time a window, or in training at times spread about it.

        Args:
            latents_TZ: standardised latents, whose targets are noised; context_TZ: from where the contexts are taken.
            keep_context_W: windows whose context is given; the others see zero vectors.
        """
        windows, is_target_T, time_T, inputs_TZ, noise_TZ = self._noised(
            batch, latents_TZ, context_TZ, time_W, keep_context_W
        )
        estimate_TZ = self._earlier_estimate(batch, inputs_TZ, is_target_T, time_T, windows)
        output = self.dit.outputs(inputs_TZ, is_target_T, time_T, windows, estimate_TZ)
        error_T = losses.squared_error(output.velocity_TZ, flow.velocity(latents_TZ, noise_TZ))
        weights_T, token_ce = is_target_T.float(), None
        if output.logits_TV is not None:
            token_ce = (F.cross_entropy(output.logits_TV, batch.tokens_T, reduction="none") * weights_T).sum()
        elif self.token_head is not None:
            weight_VD = self.token_head.weight
            token_ce, _ = losses.linear_cross_entropy(output.hidden_TD, weight_VD, batch.tokens_T, weights_T)
        return FlowErrors(error_T, weights_T, time_T, self._frozen["floors"], token_ce)

    def one_step_estimate(self, batch: Batch, time: float) -> tuple[Tensor, Tensor]:
        """Standardised latents [T, Z] with the network's estimate of z at the targets, all noised to `time`, and where they are [T]."""
        latents_TZ = self.latents(batch)
        time_W = torch.full_like(batch.window_uniforms_W2[:, 0], time)
        windows, is_target_T, time_T, inputs_TZ, _ = self._noised(
            batch, latents_TZ, latents_TZ, time_W, torch.ones_like(time_W, dtype=torch.bool)
        )
        velocity_TZ = self.dit(inputs_TZ, is_target_T, time_T, windows)
        estimate_TZ = self.dit.estimate(velocity_TZ, inputs_TZ, time_T)
        return torch.where(is_target_T[:, None], estimate_TZ, latents_TZ), is_target_T

    def _noised(
        self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, time_W: Tensor, keep_context_W: Tensor
    ) -> tuple[Segments, Tensor, Tensor, Tensor, Tensor]:
        """What the network sees: windows, where targets are [T], their times [T], noisy targets beside clean contexts; and the noise."""
        device = latents_TZ.device
        windows = Segments.from_lengths(batch.window_lengths, device)
        time_T, keep_context_T = time_W.to(device)[windows.ids_T], keep_context_W.to(device)[windows.ids_T]
        if self.training and self.config.flow.time_spread:
            spread_T = self.config.flow.time_spread * row_noise(batch, 1, purpose=TIME_NOISE)[:, 0]
            time_T = flow.move_logit(time_T, spread_T)
        time_T = time_T.float()
        roles_T = batch.roles_T.to(device, non_blocking=True)
        is_target_T = roles_T == SUFFIX
        noise_TZ = row_noise(batch, latents_TZ.shape[1])
        noisy_TZ = flow.interpolate(latents_TZ, noise_TZ, time_T[:, None])
        shown_TZ = context_TZ * (keep_context_T & (roles_T == PREFIX))[:, None]
        return windows, is_target_T, time_T, torch.where(is_target_T[:, None], noisy_TZ, shown_TZ), noise_TZ

    def _earlier_estimate(
        self, batch: Batch, inputs_TZ: Tensor, is_target_T: Tensor, time_T: Tensor, windows: Segments
    ) -> Tensor | None:
        """Self-conditioning: the network's own estimate of z, without gradient, for a keyed share of windows (all in eval mode)."""
        if not self.config.model.self_conditioning:
            return None
        with torch.no_grad():
            velocity_TZ = self.dit(inputs_TZ, is_target_T, time_T, windows)
            estimate_TZ = self.dit.estimate(velocity_TZ, inputs_TZ, time_T)
        if not self.training:
            return estimate_TZ
        # The time's uniform number, scrambled: no further key is needed, and it stays a function of the row.
        gate_W = (batch.window_uniforms_W2[:, 0] * 65536) % 1 < self.config.flow.self_conditioning_share
        return estimate_TZ * gate_W.to(inputs_TZ.device)[windows.ids_T][:, None]


STAGES: dict[str, type[VAEStage] | type[DiTStage]] = {"vae": VAEStage, "dit": DiTStage}


def build_stage(config: RunConfig, device: torch.device) -> VAEStage | DiTStage:
    """The stage that a configuration names, on `device`. Raises: UserError."""
    manifest = Manifest.load(config.data.path)
    stage = STAGES[config.stage](config, manifest, device)  # type: ignore[arg-type]
    prepare_blocks(stage, config.train)
    return stage.to(device)


def prepare_blocks(stage: nn.Module, train: Train) -> None:
    """Activation checkpointing and compilation of every Transformer's blocks, as configured."""
    for module in stage.modules():
        if isinstance(module, Transformer):
            module.checkpoint_every = train.activation_checkpointing
            if train.compile:
                for block in module.blocks:
                    block.compile(dynamic=False)


def ramp(step: int, warmup_steps: int) -> float:
    """Linear from 0 to 1 over the first `warmup_steps` steps."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
