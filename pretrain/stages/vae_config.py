"""Stage 1's configuration and its entry among the stages. The stage itself: vae.py. Without torch, so that mistakes are found at once."""

from typing import Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from data_pipeline.core.settings import STRICT, Section
from data_pipeline.features.settings import Repa
from modeling.shapes import TextVAEConfig
from pretrain.config.registry import StageKind
from pretrain.config.schema import RunConfig, inherited


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
        if self.data.split.has_targets:
            raise ValueError(
                f"data.split.kind is {self.data.split.kind}, which is stage dit's; stage vae takes truncate or none, of pairs too"
            )
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


KIND = StageKind(
    config=VAERun,
    stage="pretrain.stages.vae:VAEStage",
    inputs="pretrain.stages.inputs:of_vae",
    diagnosis="pretrain.diagnose.vae:DIAGNOSIS",
    outline="pretrain.stages.outline:of_vae",
    export="pretrain.export.text_vae:export",
    from_export="pretrain.stages.from_export:of_vae",
)
