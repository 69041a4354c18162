"""Configurations of the two baselines over tokens, and their entries among the stages. The stages: ar.py, mdlm.py. Without torch."""

from typing import Literal, Self

from pydantic import NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from data_pipeline.core.settings import STRICT, Section, Share
from modeling.shapes import TokenTransformerConfig
from pretrain.config.registry import StageKind
from pretrain.config.schema import RunConfig, inherited


@pydantic_dataclass(config=STRICT, kw_only=True)
class TokenModel(TokenTransformerConfig):
    """The architecture (modeling/token_transformer.py)."""

    vocab_size: NonNegativeInt = 0
    """Rows of embedding and head, at least the tokenizer's size; 0: the size that the data's manifest names."""

    def architecture(self) -> TokenTransformerConfig:
        """The plain dataclass of modeling."""
        return TokenTransformerConfig(**inherited(self, TokenTransformerConfig))


class TokenRun(RunConfig):
    """What both baselines share: targets given their contexts, as stage dit has them."""

    model: TokenModel

    @model_validator(mode="after")
    def _check_split(self) -> Self:
        if not self.data.split.has_targets:
            raise ValueError(
                f"data.split.kind is {self.data.split.kind}; stage {self.stage} needs context (context and target), or data"
            )
        return self


class NextToken(Section):
    """The language model's loss."""

    context_weight: Share = 1.0
    """Weight of the contexts' tokens in training, beside 1 for the targets'; held-out figures are of the targets alone."""


class ARRun(TokenRun):
    """The causal baseline: a language model of the same blocks."""

    stage: Literal["ar"]
    """Which model is trained."""
    ar: NextToken = NextToken()

    @model_validator(mode="after")
    def _check_stage(self) -> Self:
        if self.model.qk_norm:
            raise ValueError(
                "model.qk_norm is true; stage ar is exported as GPT-NeoX, which has no such norms: set false"
            )
        return self


class MDLMRun(TokenRun):
    """The baseline that denoises tokens instead of latents: masked diffusion with the same blocks."""

    stage: Literal["mdlm"]
    """Which model is trained."""


AR = StageKind(
    config=ARRun,
    stage="pretrain.stages.ar:ARStage",
    samples="pretrain.stages.samples:token_continuations",
    diagnosis="pretrain.diagnose.tokens:DIAGNOSIS",
    export="pretrain.export.language_model:export",
    outline="pretrain.stages.outline:of_ar",
    from_export="pretrain.stages.from_export:of_ar",
)
MDLM = StageKind(
    config=MDLMRun,
    stage="pretrain.stages.mdlm:MDLMStage",
    samples="pretrain.stages.samples:token_continuations",
    diagnosis="pretrain.diagnose.tokens:DIAGNOSIS",
    export="pretrain.export.masked_diffusion:export",
    outline="pretrain.stages.outline:of_mdlm",
    from_export="pretrain.stages.from_export:of_mdlm",
)
