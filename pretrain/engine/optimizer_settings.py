"""The section `optimizer` of a configuration, by its kind. Knows its optimizer by place alone: mistakes are found without torch."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from data_pipeline.core import plugins
from data_pipeline.core.settings import Section, Share

OWN = {
    "adamw": "pretrain.engine.optimizer_settings:AdamWSettings",
    "muon": "pretrain.engine.optimizer_settings:MuonSettings",
}
"""Settings of our optimizers by `optimizer.kind`; those of installed packages join in the group textldm.optimizers."""


class OptimizerSettings(Section):
    """Section `optimizer`: what all kinds have. Each kind adds its own keys, and its class's place, in a subclass."""

    optimizer: ClassVar[str]
    """Place, "module:attribute", of the subclass of `Optimizer` (optim.py) that reads these settings."""

    kind: str = "adamw"
    """Which optimizer: adamw, muon, or that of an installed package."""
    lr: PositiveFloat
    """Peak learning rate [paper, stage 1: 1e-4]."""
    weight_decay: NonNegativeFloat = 0.01
    """On matrices; biases, norms and embeddings are exempt [paper, stage 1: 0.01]."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    ema_decay: Share = 0.9999
    """Share of the average that a step keeps; step s at most (1 + s) / (10 + s), so that a young average forgets its random start."""

    @model_validator(mode="after")
    def _check_ema(self) -> Self:
        if self.ema_decay == 1:
            raise ValueError(
                "optimizer.ema_decay is 1, which keeps the first weights for ever; expected below 1, e.g. 0.9999"
            )
        return self

    def ema_decay_at(self, step: int) -> float:
        """Decay used by update number `step` (from 0): min(ema_decay, (1 + step) / (10 + step))."""
        return min(self.ema_decay, (1 + step) / (10 + step))


class AdamWSettings(OptimizerSettings):
    """AdamW on fp32 masters, with the EMA as one more state."""

    optimizer = "pretrain.engine.adamw:AdamW"
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    @model_validator(mode="after")
    def _check_betas(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {list(self.betas)}; each must lie in [0, 1)")
        return self


class MuonSettings(AdamWSettings):
    """Muon on hidden matrices; the keys of AdamW are for all other parameters, weight_decay for both."""

    optimizer = "pretrain.engine.muon:Muon"
    matrix_lr: PositiveFloat = 0.02
    """Peak learning rate of the hidden matrices: about the largest relative change of a step."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Share of a matrix's momentum that a step keeps."""


def optimizer_settings(kind: str) -> type[OptimizerSettings]:
    """The section of the optimizer of that name. Raises: UserError."""
    return plugins.load("optimizers", kind, OWN)


def optimizer_names() -> list[str]:
    """All kinds, ours first."""
    return plugins.names("optimizers", OWN)
