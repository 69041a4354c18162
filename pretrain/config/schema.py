"""A run's configuration, and the sections that only one stage has: every key with its type, default, unit and meaning.

Marks: [paper] is stated by TextLDM (arXiv 2605.07748). Sections of both stages: config_sections.py.
Checks across keys: config_checks.py. Reading, overrides and messages: config.py.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass as pydantic_dataclass

from modeling.text_dit import TextDiTConfig
from modeling.text_vae import TextVAEConfig
from pretrain.config import checks
from pretrain.config.sections import (
    STRICT,
    About,
    Data,
    Diagnose,
    Optimizer,
    Schedule,
    Section,
    Share,
    TelemetrySection,
    Train,
)


@pydantic_dataclass(config=STRICT, kw_only=True)
class VAEModel(TextVAEConfig):
    """The TextVAE's architecture (modeling/text_vae.py)."""

    vocab_size: NonNegativeInt = 0
    """Rows of embedding and head, at least the tokenizer's size; 0: the size that the data's manifest names."""

    def architecture(self) -> TextVAEConfig:
        """The plain dataclass of modeling, which exported folders carry."""
        return TextVAEConfig(**_inherited(self, TextVAEConfig))


@pydantic_dataclass(config=STRICT, kw_only=True)
class DiTModel(TextDiTConfig):
    """The TextDiT's architecture (modeling/text_dit.py) and the VAE in whose latent space it works."""

    vae: str
    """Run folder (or checkpoint) of stage 1; frozen, EMA weights."""

    def architecture(self) -> TextDiTConfig:
        """The plain dataclass of modeling, which exported folders carry."""
        return TextDiTConfig(**_inherited(self, TextDiTConfig))


class Repa(Section):
    """Representation alignment of the VAE's encoder with a frozen language model (stage 1)."""

    weight: NonNegativeFloat = 1.0
    """lambda of the loss; 0 leaves the teacher out [paper: 1]."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the weight rises linearly from 0."""
    features: str | None = None
    """Folder of cached features (textldm cache)."""
    teacher: str | None = None
    """Hub id or folder of the causal language model whose features the cache holds; textldm cache reads it here."""
    revision: str | None = None
    """Commit of that teacher on the hub."""
    online_teacher: str | None = None
    """Instead of a cache: hub id or folder of a causal language model, run in the loop."""
    online_revision: str | None = None
    """Commit of the online teacher on the hub."""
    layer: int = -3
    """Hidden state that is the target, index into transformers' hidden_states [paper: third-to-last]."""


class KL(Section):
    """The VAE's posterior against the unit Gaussian (stage 1)."""

    weight: NonNegativeFloat = 1e-3
    """beta of the loss [paper: 1e-3]."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the weight rises linearly from 0."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over channels; always averaged over tokens. mean is latent_dim times weaker."""


class Flow(Section):
    """Conditional flow matching in the latent space (stage 2). t = 0 is data, t = 1 is noise."""

    time_kind: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of t in training, before the shift; uniform reads neither mean nor deviation [paper: logit_normal]."""
    time_mean: float = 0.0
    """Mean of logit(t)."""
    time_std: PositiveFloat = 1.5
    """Standard deviation of logit(t) [paper: 1.5]."""
    time_shift: PositiveFloat = 1.0
    """t -> shift t / (1 + (shift - 1) t); above 1 moves training towards noise."""
    time_spread: NonNegativeFloat = 0.0
    """In training each target token has a time of its own: logit(t) is the window's plus N(0, time_spread^2). Cleaner tokens beside
    noisier ones teach what neighbours say of each other; sampling and evaluation keep one time a window [paper: 0]."""
    time_shift_base_dim: NonNegativeInt = 0
    """Latent dimension for which time_shift is meant: others multiply it by sqrt(latent_dim / this); 0: the same for all."""
    context_drop: Share = 0.1
    """Share of windows whose context latents are zero, for classifier-free guidance [paper: 0.1]."""
    target: Literal["mean", "sample"] = "mean"
    """Latents to model: the posterior's mean, or a sample of it."""
    self_conditioning_share: Share = 0.5
    """Share of windows that are given an earlier estimate of z, when model.self_conditioning is on."""
    token_loss_weight: NonNegativeFloat = 0.0
    """Weight of an auxiliary cross-entropy of the target tokens: of the posterior's logits with posterior prediction, else of a linear
    map of the DiT's hidden states; 0: none [paper: none]."""
    statistics_rows: PositiveInt = 64
    """Training rows from which the latents' mean, deviation and floors are estimated before the first step."""


class RunConfig(Section):
    """What both stages share; a loaded configuration is a `VAERun` or a `DiTRun`."""

    stage: Literal["vae", "dit"]
    """Which model is trained."""
    about: About = About()
    """For readers."""
    data: Data
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    train: Train
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Merged over the DeepSpeed configuration that pretrain/engine.py generates."""
    telemetry: TelemetrySection = TelemetrySection()
    diagnose: Diagnose = Diagnose()

    @property
    def run_folder(self) -> Path:
        """The run's folder, e.g. runs/dit_xl."""
        return Path(self.train.run)

    @model_validator(mode="after")
    def _check(self) -> Self:
        checks.check_data(self.data)
        checks.check_optimizer(self.optimizer)
        checks.check_schedule(self.schedule, self.train.steps)
        checks.check_sharding(self.train)
        checks.check_faults(self.train)
        return self


class VAERun(RunConfig):
    """Stage 1: the TextVAE."""

    stage: Literal["vae"]
    """Which model is trained."""
    model: VAEModel
    repa: Repa = Repa()
    kl: KL = KL()

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


class DiTRun(RunConfig):
    """Stage 2: the TextDiT on a frozen TextVAE."""

    stage: Literal["dit"]
    """Which model is trained."""
    model: DiTModel
    flow: Flow = Flow()

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        checks.check_heads("model", self.model.width, self.model.head_dim)
        if self.data.split.kind != "context":
            raise ValueError(f"data.split.kind is {self.data.split.kind}; stage dit needs context (context and target)")
        return self


def _inherited(section: Any, plain: type) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(plain)}
