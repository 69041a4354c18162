"""An optimizer from outside: SGD with momentum, whose only state is not one of AdamW's. One class, one section."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from pretrain.engine.optim import Optimizer
from pretrain.engine.optimizer_settings import OptimizerSettings
from tests.installed_package import install


class ToySGDSettings(OptimizerSettings):
    """Section `optimizer` of kind toy_sgd."""

    optimizer = "tests.pretrain.toy_sgd:ToySGD"
    kind: str = "toy_sgd"
    momentum: float = 0.9
    """Share of the velocity that a step keeps."""


class ToySGD(Optimizer):
    """torch.optim.SGD's rule."""

    states = ("velocity",)

    def update(self, weight: Tensor, grad: Tensor, states: dict[str, Tensor], group: dict[str, Any]) -> None:
        velocity = states["velocity"]
        velocity.mul_(self.settings.momentum).add_(grad).add_(weight, alpha=group["weight_decay"])
        weight.add_(velocity, alpha=-group["lr"])


def install_toy_sgd(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """As an installed package would bring it along."""
    install(folder, monkeypatch, "textldm.optimizers", toy_sgd="tests.pretrain.toy_sgd:ToySGDSettings")
