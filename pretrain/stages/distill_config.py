"""The configuration of distillation and its entry among the stages. The stage itself: distill.py. Without torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from data_pipeline.core.settings import OnResume, Section, Share
from pretrain.config.registry import StageKind
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.inputs import TEACHER_KEY


class Distill(Section):
    """What the student learns to do in few steps: the teacher's way to sample."""

    teacher: Annotated[str, OnResume.FREE]  # its fingerprint is compared by itself
    """Run folder (or checkpoint) of stage dit, or of distill to halve a student's steps once more, or the export of a DiT, here or as
    hf://owner/name; its EMA weights are frozen, and the student's first."""
    num_steps: PositiveInt = 8
    """Euler steps that the student samples with, one network evaluation each."""
    teacher_steps: PositiveInt = 2
    """Euler steps that the teacher takes over each of them; a step under guidance is two evaluations."""
    guidance_scale: NonNegativeFloat = 7.0
    """Classifier-free guidance of the teacher's steps, which the student needs no more; 1: none [paper: 7]."""
    guidance_interval: tuple[Share, Share] = (0.0, 1.0)
    """Times between which the teacher is guided."""
    token_temperature: PositiveFloat = 1.0
    """Divides the logits of the teacher's categorical head, and of the student's, whose own temperature it stays."""

    @property
    def teacher_passes(self) -> int:
        """Network evaluations of the teacher to one of the student's."""
        return self.teacher_steps * (1 if self.guidance_scale == 1 else 2)

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        low, high = self.guidance_interval
        if low >= high:
            raise ValueError(f"distill.guidance_interval is {low:g} to {high:g}; expected times that rise, e.g. 0 to 1")
        return self


class DistillRun(DiTRun):
    """A TextDiT that samples in few steps, from one that needs many. Of section `flow` it reads the times, `target` and `statistics_rows`;
    section `diagnose` says of sampling what the student is made for, or nothing."""

    stage: Literal["distill"]  # type: ignore[assignment]
    """Which model is trained."""
    distill: Distill

    @property
    def first_weights(self) -> tuple[str, str] | None:
        return TEACHER_KEY, self.distill.teacher

    @property
    def earlier_stages(self) -> tuple[str, ...]:
        return "dit", "distill"

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if not self.data.split.has_targets:
            raise ValueError(
                f"data.split.kind is {self.data.split.kind}; stage distill needs context (context and target), or data"
            )
        if self.train.init_from:
            raise ValueError(
                "train.init_from is set; stage distill starts from the weights of distill.teacher: leave it out, or name that run there"
            )
        if self.model.self_conditioning:
            raise ValueError(
                "model.self_conditioning is true; stage distill learns single steps, which know no earlier estimate: distil a DiT that was"
                " trained without"
            )
        if self.distill.token_temperature != 1 and self.model.head != "categorical":
            raise ValueError(
                f"distill.token_temperature is {self.distill.token_temperature:g}; expected 1 with model.head {self.model.head}: only the"
                " categorical head has probabilities to sharpen"
            )
        own: dict[str, Any] = {"num_steps": self.distill.num_steps, "guidance_scale": 1.0, "solver": "euler"}
        own |= {"token_temperature": self.distill.token_temperature}
        for name, value in own.items():
            if name in self.diagnose.model_fields_set and (found := getattr(self.diagnose, name)) != value:
                raise ValueError(
                    f"diagnose.{name} is {found}; a student is sampled as it is made to be: set diagnose.{name}={value}, or leave it out"
                )
        self.diagnose = self.diagnose.model_copy(update=own)
        return self


KIND = StageKind(
    config=DistillRun,
    stage="pretrain.stages.distill:DistillStage",
    inputs="pretrain.stages.inputs:of_distill",
    measure="pretrain.stages.latent_statistics:measure",
    samples="pretrain.stages.samples:student_continuations",
    diagnosis="pretrain.diagnose.distill:DIAGNOSIS",
    export="pretrain.export.textldm:export",
    outline="pretrain.stages.outline:of_distill",
)
