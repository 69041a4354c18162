"""Stage 2's configuration and its entry among the stages. The stage itself: dit.py. Without torch, so that mistakes are found at once."""

from typing import Annotated, Literal, Self

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from data_pipeline.core.settings import STRICT, OnResume, Section, Share
from modeling.shapes import TextDiTConfig
from pretrain.config.registry import StageKind
from pretrain.config.schema import RunConfig, inherited


@pydantic_dataclass(config=STRICT, kw_only=True)
class DiTModel(TextDiTConfig):
    """The TextDiT's architecture (modeling/text_dit.py) and the VAE in whose latent space it works."""

    vae: Annotated[str, OnResume.FREE]  # its fingerprint is compared by itself
    """Run folder, checkpoint or export of stage 1, here or on the hub (hf://owner/name); frozen, EMA weights."""

    def architecture(self) -> TextDiTConfig:
        """The plain dataclass of modeling, which exported folders carry."""
        return TextDiTConfig(**inherited(self, TextDiTConfig))


class Flow(Section):
    """Conditional flow matching in the latent space (stage 2). t = 0 is data, t = 1 is noise."""

    time_kind: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of t in training, before the shift; uniform reads neither mean nor deviation [paper: logit_normal]."""
    time_mean: float = 0.0
    """Mean of logit(t)."""
    time_std: PositiveFloat = 1.5
    """Standard deviation of logit(t) [paper: 1.5]."""
    time_shift: PositiveFloat = 1.0
    """t -> shift t / (1 + (shift - 1) t); above 1 moves training towards noise. Latents of k times as many channels keep their
    signal-to-noise ratio with sqrt(k) times the shift (arXiv 2403.03206, Sec. 5.3.2)."""
    time_spread: NonNegativeFloat = 0.0
    """In training each target token has a time of its own: logit(t) is the window's plus N(0, time_spread^2). Cleaner tokens beside
    noisier ones teach what neighbours say of each other. Sampling and the bound go along times so spread [paper: 0]."""
    context_drop: Share = 0.1
    """Share of windows whose context latents are zero, for classifier-free guidance [paper: 0.1]."""
    target: Literal["mean", "sample"] = "mean"
    """Latents to model: the posterior's mean, or a sample of it."""
    token_loss_weight: NonNegativeFloat = 0.0
    """Weight of an auxiliary cross-entropy of the target tokens: of the categorical head's logits, else of a linear map of the
    DiT's hidden states; 0: none [paper: none]."""
    through_tokens: bool = False
    """Whether the flow loss trains the categorical head's logits, too, through the mean latent; they are then computed twice."""
    statistics_rows: PositiveInt = 64
    """Training rows from which the latents' mean, deviation and floors are estimated before the first step."""


class DiTRun(RunConfig):
    """Stage 2: the TextDiT on a frozen TextVAE."""

    stage: Literal["dit"]
    """Which model is trained."""
    model: DiTModel
    flow: Flow = Flow()

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if not self.data.split.has_targets:
            raise ValueError(
                f"data.split.kind is {self.data.split.kind}; stage dit needs context (context and target), or data"
            )
        learns = self.flow.token_loss_weight or self.flow.through_tokens
        if self.model.head == "categorical" and not learns:
            raise ValueError(
                "flow.token_loss_weight is 0 and flow.through_tokens false, so that nothing would train the categorical head's logits:"
                " set flow.token_loss_weight=1"
            )
        return self


KIND = StageKind(
    config=DiTRun,
    stage="pretrain.stages.dit:DiTStage",
    inputs="pretrain.stages.inputs:of_dit",
    measure="pretrain.stages.latent_statistics:measure",
    samples="pretrain.stages.samples:continuations",
    diagnosis="pretrain.diagnose.dit:DIAGNOSIS",
    export="pretrain.export.textldm:export",
    outline="pretrain.stages.outline:of_dit",
    from_export="pretrain.stages.from_export:of_dit",
)
