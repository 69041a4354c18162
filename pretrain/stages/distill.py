"""Distillation: a student TextDiT whose every step goes where several of its teacher's guided steps go.

    student    z_s = z_t + (s - t) v(z_t, t)                         one evaluation, t and s neighbours on the student's grid
    teacher    z_s = k Euler steps from z_t along v_0 + g (v_c - v_0)     2 k evaluations, on the grid of k times as many steps
    loss       mean over channels of (n (z_s student - z_s teacher))^2     sum over target tokens / targets, n steps in all

This is progressive distillation (arXiv 2202.00512) of a guided model (2210.03142, whose first stage folds guidance in) with Euler's steps,
which are DDIM's: a student starts from its teacher's weights, and may be the teacher of one with fewer steps. An error counts by how far
it leads off: a velocity's error times the step's length, which of a token's steps together is 1. So the tokens of one window, whose
times may be spread, and the steps of one token weigh as much as they move the sample.

Shape letters: T packed tokens, Z latent dim, W windows, k the teacher's steps to one of the student's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch
from modeling import flow, losses
from modeling.attention import Segments
from modeling.guidance import GuidedVelocity
from modeling.heads import CategoricalHead
from modeling.solvers import euler
from modeling.text_dit import TextDiT
from modeling.times import move_logit
from pretrain.checkpoint.read import load_weights
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import renamed
from pretrain.stages.base import StageOutput, row_noise, weighted
from pretrain.stages.distill_config import DistillRun
from pretrain.stages.dit import TIME_NOISE, DiTStage
from pretrain.stages.earlier import earlier_weights
from pretrain.telemetry.flops import dit_flops

DIT_PREFIX = "dit."


@dataclass(frozen=True)
class Teacher:
    """A model that is not trained, out of sight of what collects a stage's parameters."""

    dit: TextDiT


@dataclass(frozen=True)
class Steps:
    """One step of every window: noisy targets beside clean contexts at its beginning, and the times on the way.

    Attributes:
        inputs_TZ: fp32; is_target_T: which are targets.
        path: float64 [T, 1] each, k + 1 falling times of every token: the student's step leads from the first to the last.
    """

    inputs_TZ: Tensor
    is_target_T: Tensor
    windows: Segments
    path: list[Tensor]

    @property
    def weights_T(self) -> Tensor:
        """1 at targets."""
        return self.is_target_T.float()

    @property
    def length_T1(self) -> Tensor:
        """How far the step goes in t, float64, more than 0."""
        return self.path[0] - self.path[-1]


class DistillStage(DiTStage):
    """E || n (s - t) (v(z_t, z_c) - (z_s - z_t) / (s - t)) ||^2 on the target tokens, z_s being where the guided teacher comes to."""

    config: DistillRun

    def __init__(self, config: DistillRun, manifest: Manifest, device: torch.device):
        super().__init__(config, manifest, device)
        self.token_head = None
        if isinstance(self.dit.head, CategoricalHead):
            self.dit.head.through_mean = True
        with torch.device("meta"):
            teacher = TextDiT(self.dit.config)
        teacher.to_empty(device=device)
        if isinstance(teacher.head, CategoricalHead):
            teacher.head.through_mean = True
        with earlier_weights(config, manifest) as (tensors, source):
            load_weights(teacher, _of_dit(tensors), source)
        self.teacher = Teacher(teacher.eval().requires_grad_(False))

    def load_first(self, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
        """The DiT and its latent space, without what else the teacher's run trained."""
        wanted = self.state_dict().keys()
        self.load_trained(renamed(tensors, {name: name for name in tensors if name in wanted}), source)

    def flops(self, batch: Batch) -> float:
        lengths = batch.window_lengths, batch.segment_lengths
        passes = self.config.distill.teacher_passes
        return dit_flops(self.config.model, self.vae.config, *lengths, batch.num_tokens(SUFFIX), passes)

    def forward(self, batch: Batch, counts: dict[str, int]) -> StageOutput:
        latents_TZ, num_steps = self.latents(batch), self.config.distill.num_steps
        if self.training:
            uniform_W = batch.window_uniforms_W2[:, 0]
            steps = self.steps_of(batch, latents_TZ, (uniform_W * num_steps).long().clamp(0, num_steps - 1))
            error_T, weights_T = (
                self.errors(self.dit, batch, steps, self.wanted_velocity(batch, steps)),
                steps.weights_T,
            )
            return StageOutput(
                (error_T * weights_T).sum() / counts["targets"], {"distill": weighted(error_T, weights_T)}
            )
        found: dict[str, list[Tensor]] = {"distill": [], "distill_teacher": []}
        for step in range(num_steps):
            step_W = torch.full_like(batch.window_uniforms_W2[:, 0], step, dtype=torch.int64)
            steps = self.steps_of(batch, latents_TZ, step_W)
            wanted_TZ = self.wanted_velocity(batch, steps)
            for name, dit in zip(found, (self.dit, self.teacher.dit)):
                found[name].append(weighted(self.errors(dit, batch, steps, wanted_TZ), steps.weights_T))
        metrics = {name: torch.stack(pairs).sum(0) for name, pairs in found.items()}
        return StageOutput(metrics["distill"][0] / num_steps / counts["targets"], metrics)

    def summarised(self, means: dict[str, float]) -> dict[str, float]:
        """With `distilled`: the share of the error that its teacher makes in the same steps, unguided, which is gone."""
        plain = means.get("distill_teacher", 0.0)
        return means | ({"distilled": 1 - means["distill"] / plain} if plain else {})

    def errors(self, dit: TextDiT, batch: Batch, steps: Steps, wanted_TZ: Tensor) -> Tensor:
        """Squared error of where one step without guidance ends, per token, fp32 [T]: of the student, or of the teacher as it was."""
        settings = self.config.distill
        given = steps.inputs_TZ, steps.is_target_T, steps.path[0][:, 0].float(), steps.windows
        found = dit(*given, targets=self.targets_of(batch), token_temperature=settings.token_temperature)
        share_T = settings.num_steps * steps.length_T1[:, 0]
        return losses.squared_error(found.velocity_TZ, wanted_TZ) * share_T.square().float()

    def steps_of(self, batch: Batch, latents_TZ: Tensor, step_W: Tensor) -> Steps:
        """The step of that number of each window, 0 being the one that begins with noise, at its tokens' own times."""
        settings, device = self.config.distill, latents_TZ.device
        windows = Segments.from_lengths(batch.window_lengths, device)
        fine = self.times.grid(settings.num_steps * settings.teacher_steps).to(device)
        first_T = step_W.to(device)[windows.ids_T] * settings.teacher_steps
        path = [fine[first_T + i][:, None] for i in range(settings.teacher_steps + 1)]
        if spread := self.config.flow.time_spread:
            offset_T1 = spread * row_noise(batch, 1, purpose=TIME_NOISE).double()
            path = [move_logit(time_T1, offset_T1) for time_T1 in path]
        roles_T, noise_TZ = batch.roles_T, row_noise(batch, latents_TZ.shape[1])
        is_target_T = roles_T == SUFFIX
        noisy_TZ = flow.interpolate(latents_TZ, noise_TZ, path[0].float())
        inputs_TZ = torch.where(is_target_T[:, None], noisy_TZ, latents_TZ * (roles_T == PREFIX)[:, None])
        return Steps(inputs_TZ, is_target_T, windows, path)

    @torch.no_grad()
    def wanted_velocity(self, batch: Batch, steps: Steps) -> Tensor:
        """The velocity that leads in one step where the teacher's guided steps lead, fp32 [T, Z]; zero at the contexts."""
        settings = self.config.distill
        velocity = GuidedVelocity(
            self.teacher.dit,
            steps.inputs_TZ,
            steps.is_target_T,
            steps.windows,
            settings.guidance_scale,
            settings.guidance_interval,
            settings.token_temperature,
            batch.places(SUFFIX),
        )
        begin_TZ = steps.inputs_TZ * steps.is_target_T[:, None]

        def followed(z_TZ: Tensor, time_T1: Tensor) -> Tensor:
            return velocity(z_TZ.to(begin_TZ.dtype), time_T1)

        device = begin_TZ.device
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # where the kernels want it
            end_TZ = euler(followed, begin_TZ, steps.path)  # in float64, as the times are
        return ((begin_TZ - end_TZ) / steps.length_T1).float()


def _of_dit(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return renamed(tensors, {name.removeprefix(DIT_PREFIX): name for name in tensors if name.startswith(DIT_PREFIX)})
