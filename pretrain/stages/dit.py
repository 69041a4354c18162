"""Stage 2: the TextDiT learns the flow from noise to the latents of a frozen TextVAE (TextLDM).

Shape letters: T packed tokens, D width, Z latent dim, W windows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch
from modeling import flow, losses
from modeling.attention import Segments
from modeling.floors import NAMES as FLOOR_NAMES
from modeling.floors import Floors
from modeling.heads import CategoricalHead, TokenHead, TokenTargets, VelocityHead
from modeling.likelihood import (
    SPREAD_LEVELS,
    Denoiser,
    DocumentNats,
    denoiser,
    document_nats,
    spread_nats,
    time_grid,
    told_latents,
)
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from modeling.times import TimeDistribution, move_logit
from pretrain.checkpoint.storage import Checkpoint
from pretrain.engine.pieces import weights_on
from pretrain.stages.base import Stage, StageOutput, row_noise, weighted
from pretrain.stages.dit_config import DiTRun, Flow
from pretrain.stages.frozen_vae import load_vae, posterior, training_encoder
from pretrain.stages.latent_statistics import LATENTS_NAME, LatentStatistics
from pretrain.telemetry.flops import dit_flops

QUARTERS = 4
SELF_CONDITIONED = 0.5
"""Share of training's windows that are given an earlier estimate of z, with model.self_conditioning (arXiv 2208.04202)."""
TIME_NOISE, POSTERIOR_NOISE, LIKELIHOOD_NOISE = 1, 2, 1024
"""Purposes of keyed noise beside the flow's own: the spread of times over a window's tokens, draws from the VAE's posterior, and from
here on the times of the bound on the likelihood."""
TIMES, HELDOUT_TIMES = time_grid(), time_grid(10, 0.35)
"""Of the bound on the likelihood: all of them, and the few that held-out evaluations during training can afford."""
HELDOUT_SPREAD = HELDOUT_TIMES[:3], 6
"""What they can afford along tokens' own times: some t0, and levels of noise for each."""
BOUND_PREFIX = "nats_at_"


def times_of(settings: Flow) -> TimeDistribution:
    """Distribution of t, in training and as the sampling schedule."""
    return TimeDistribution(
        kind=settings.time_kind,
        mean=settings.time_mean,
        std=settings.time_std,
        shift=settings.time_shift,
        spread=settings.time_spread,
    )


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
        """Flow loss, and by quarter of t the loss and the floors at the very same times, as (sum, weight) by name."""
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


@dataclass(frozen=True)
class LatentSpace:
    """Where a DiT works: the frozen VAE, what predictors without language reach on its latents, and the tokens' frequencies."""

    vae: TextVAE
    floors: Floors
    log_frequencies_V: Tensor


class DiTStage(Stage):
    """L_FM = E || v(z_t, z_c) - v* ||^2 on the target tokens of a frozen VAE's latents (TextLDM, stage 2), per channel."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, config: DiTRun, manifest: Manifest, device: torch.device):
        super().__init__()
        self.config = config
        vae, statistics = self.frozen(config, manifest)
        statistics.apply(vae.to(device))
        self.space = LatentSpace(vae, statistics.floors.to(device), statistics.log_frequencies_V.to(device))
        shape = config.model.architecture()
        shape.vocab_size = vae.config.vocab_size
        with weights_on(device):
            self.dit = TextDiT(shape)
        if isinstance(self.dit.head, CategoricalHead):
            statistics.apply_tokens(self.dit.head)
            self.dit.head.through_mean = config.flow.through_tokens
        self.token_head: TokenHead | None = None
        if config.flow.token_loss_weight and isinstance(self.dit.head, VelocityHead):
            with weights_on(device):
                self.token_head = TokenHead(config.model.width, vae.config.vocab_size)
        # Part of the checkpoint, so that an export needs nothing but it.
        self.register_buffer("latents_mean", vae.latents_mean.clone())
        self.register_buffer("latents_std", vae.latents_std.clone())
        self.times = times_of(config.flow)

    @staticmethod
    def frozen(config: DiTRun, manifest: Manifest) -> tuple[TextVAE, LatentStatistics]:
        """What is there before the DiT: the VAE of `model.vae`, and what was measured of its latents (`measure`). Raises: UserError."""
        vae = load_vae(config.model.vae, manifest, config.model.latent_dim)
        return vae, LatentStatistics.load(config.run_folder / LATENTS_NAME)

    @property
    def vae(self) -> TextVAE:
        """The frozen VAE."""
        return self.space.vae

    @cached_property
    def encoder(self) -> TextVAE:
        """The frozen VAE's encoder as training computes it; made when it is first asked for, which is in training alone."""
        return training_encoder(self.vae, self.config.train, self.vae.latents_mean.device)

    @property
    def floors(self) -> Floors:
        """What predictors without language reach on this VAE's latents."""
        return self.space.floors

    def load_trained(self, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
        """The VAE gets the statistics that the DiT was trained with, which are those of its checkpoint."""
        super().load_trained(tensors, source)
        self.vae.latents_mean.copy_(self.latents_mean)
        self.vae.latents_std.copy_(self.latents_std)

    def token_counts(self, batch: Batch) -> dict[str, int]:
        """`targets`: tokens whose velocity is learned."""
        return {"targets": batch.num_tokens(SUFFIX)}

    def flops(self, batch: Batch) -> float:
        lengths = batch.window_lengths, batch.segment_lengths
        return dit_flops(self.config.model, self.vae.config, *lengths, batch.num_tokens(SUFFIX))

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
        return StageOutput(total / counts["targets"], metrics | self._nats(batch))

    def _nats(self, batch: Batch) -> dict[str, Tensor]:
        """The bound at some t0, along the paths that training takes, and the unigram's nats."""
        device, tokens_M = batch.tokens_T.device, self.targets_of(batch).tokens_M
        if self.config.flow.time_spread:
            times, levels = HELDOUT_SPREAD
            bounds = [self.spread_nats(batch, t0, num_levels=levels).bounds_NG for t0 in times]
        else:
            times = HELDOUT_TIMES[:-2]  # between the last two nothing is decided
            bounds = [self.document_nats(batch, HELDOUT_TIMES).bounds_NG]
        totals = zip(times, torch.cat(bounds, dim=1).sum(0))
        pairs = {f"{BOUND_PREFIX}{t0:.2f}": total for t0, total in totals}
        pairs["unigram_nats"] = -self.space.log_frequencies_V[tokens_M].sum()
        return {name: torch.tensor([float(total), len(tokens_M)], device=device) for name, total in pairs.items()}

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """With the least of the bounds, and its t0, in their place. It is chosen on the rows that it is told of, among few."""
        bounds = {name: value for name, value in means.items() if name.startswith(BOUND_PREFIX)}
        rest = {name: value for name, value in means.items() if name not in bounds}
        if not bounds:
            return rest
        best = min(bounds, key=lambda name: bounds[name])
        return rest | {"nats": bounds[best], "nats_t0": float(best.removeprefix(BOUND_PREFIX))}

    def heldout_flow(self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, quarter: int) -> "FlowErrors":
        """Errors with every window at one time of a quarter of [0, 1], uniformly, always with a context."""
        time_W = (batch.window_uniforms_W2[:, 0] + quarter) / QUARTERS
        return self.flow_errors(batch, latents_TZ, context_TZ, time_W, torch.ones_like(time_W, dtype=torch.bool))

    def latents(self, batch: Batch) -> Tensor:
        """Standardised latents fp32 [T, Z], context and target of a window encoded separately."""
        mean_TZ, log_variance_TZ = posterior(self.encoder if self.training else self.vae, batch)
        if self.config.flow.target == "sample" and self.training:
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
        weights_T = is_target_T.float()
        targets = self.targets_of(batch)
        output = self.dit(inputs_TZ, is_target_T, time_T, windows, estimate_TZ, targets=targets)
        error_T = losses.squared_error(output.velocity_TZ, flow.velocity(latents_TZ, noise_TZ))
        token_ce = output.token_loss
        if self.token_head is not None:
            token_ce, _ = losses.linear_cross_entropy(
                output.hidden_TD, self.token_head.weight, batch.tokens_T, weights_T
            )
        return FlowErrors(error_T, weights_T, time_T, self.floors, token_ce)

    def targets_of(self, batch: Batch) -> TokenTargets:
        """The target tokens and where they stand, from what the host knows: no device is waited for."""
        places_M = batch.places(SUFFIX)
        return TokenTargets(places_M, batch.tokens_T[places_M])

    def one_step_estimate(self, batch: Batch, time: float) -> tuple[Tensor, Tensor]:
        """Standardised latents [T, Z] with the network's estimate of z at the targets, all noised to `time`, and where they are [T]."""
        latents_TZ = self.latents(batch)
        time_W = torch.full_like(batch.window_uniforms_W2[:, 0], time)
        windows, is_target_T, time_T, inputs_TZ, _ = self._noised(
            batch, latents_TZ, latents_TZ, time_W, torch.ones_like(time_W, dtype=torch.bool)
        )
        velocity_TZ = self.dit(inputs_TZ, is_target_T, time_T, windows, targets=self.targets_of(batch)).velocity_TZ
        estimate_TZ = self.dit.estimate(velocity_TZ, inputs_TZ, time_T)
        return torch.where(is_target_T[:, None], estimate_TZ, latents_TZ), is_target_T

    @torch.no_grad()
    def document_nats(
        self, batch: Batch, times: tuple[float, ...] = TIMES, context_TZ: Tensor | None = None
    ) -> DocumentNats:
        """What the bound on the likelihood is made of, of every window with a target (modeling/likelihood.py).

        context_TZ: from where the contexts are taken, [T, Z]; their own when None.
        """
        return document_nats(*self._measured_documents(batch, context_TZ), times)

    @torch.no_grad()
    def spread_nats(
        self, batch: Batch, t0: float, context_TZ: Tensor | None = None, num_levels: int = SPREAD_LEVELS
    ) -> DocumentNats:
        """The same along a path on which each token has a time of its own, spread as in training, down to t0."""
        draws_T2, spread = row_noise(batch, 2, purpose=TIME_NOISE), self.config.flow.time_spread
        return spread_nats(*self._measured_documents(batch, context_TZ), t0, spread, draws_T2, num_levels)

    def _measured_documents(
        self, batch: Batch, context_TZ: Tensor | None
    ) -> tuple[Denoiser, Tensor, Callable[[int], Tensor], Tensor, Tensor]:
        """What likelihood.py asks for: model, latents, noise, and which tokens are whose targets."""
        latents_TZ, device = self.latents(batch), batch.tokens_T.device
        windows, segments = (Segments.from_lengths(x, device) for x in (batch.window_lengths, batch.segment_lengths))
        roles_T = batch.roles_T
        shown_TZ = (latents_TZ if context_TZ is None else context_TZ) * (roles_T == PREFIX)[:, None]

        def noise_of(index: int) -> Tensor:
            return row_noise(batch, latents_TZ.shape[1], purpose=LIKELIHOOD_NOISE + index)

        targets = self.targets_of(batch)
        denoise = denoiser(self.vae, self.dit, shown_TZ, targets, windows, segments)
        return denoise, told_latents(self.dit, latents_TZ, targets), noise_of, windows.ids_T, roles_T == SUFFIX

    def _noised(
        self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, time_W: Tensor, keep_context_W: Tensor
    ) -> tuple[Segments, Tensor, Tensor, Tensor, Tensor]:
        """What the network sees: windows, where targets are [T], their times [T], noisy targets beside clean contexts; and the noise."""
        device = latents_TZ.device
        windows = Segments.from_lengths(batch.window_lengths, device)
        time_T, keep_context_T = time_W.to(device)[windows.ids_T], keep_context_W.to(device)[windows.ids_T]
        if self.training and self.config.flow.time_spread:
            spread_T = self.config.flow.time_spread * row_noise(batch, 1, purpose=TIME_NOISE)[:, 0]
            time_T = move_logit(time_T, spread_T)
        time_T = time_T.float()
        roles_T = batch.roles_T
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
            velocity_TZ = self.dit(inputs_TZ, is_target_T, time_T, windows, targets=self.targets_of(batch)).velocity_TZ
            estimate_TZ = self.dit.estimate(velocity_TZ, inputs_TZ, time_T)
        if not self.training:
            return estimate_TZ
        # The time's uniform number, scrambled: no further key is needed, and it stays a function of the row.
        gate_W = (batch.window_uniforms_W2[:, 0] * 65536) % 1 < SELF_CONDITIONED
        return estimate_TZ * gate_W.to(inputs_TZ.device)[windows.ids_T][:, None]
