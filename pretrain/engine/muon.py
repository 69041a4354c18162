"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum of a matrix, orthogonalised.

For the hidden matrices of the blocks. A block says itself which of its linear maps these are, and how many matrices lie on
top of one another in a weight (attribute `matrices` of the linear map, modeling/layers.py): queries, keys and values are
orthogonalised apart. All other parameters are AdamW's.

    m <- momentum m + (1 - momentum) g
    W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) NS((1 - momentum) g + momentum m)

NS takes all singular values to about 1 (between 0.7 and 1.2) by five Newton-Schulz steps X <- a X + (b A + c A A) X with
A = X X^T; so an update changes a hidden vector of unit size per channel by about lr per channel, whatever the width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pretrain.engine.adamw import AdamW
from pretrain.engine.matrices import WholeMatrices
from pretrain.engine.optimizer_settings import MuonSettings

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""a, b, c: the quintic that lifts small singular values fastest, at the price of not converging to 1."""
NEWTON_SCHULZ_STEPS = 5
SMALLEST_NORM = 1e-30


class Muon(AdamW):
    """Momentum is the one state of a hidden matrix; AdamW's two are those of the others."""

    def __init__(self, module: nn.Module, settings: MuonSettings) -> None:
        self.matrices = hidden_matrices(module)
        super().__init__(module, settings)

    def groups(self, module: nn.Module, settings: MuonSettings) -> list[dict[str, Any]]:
        """AdamW's groups without the hidden matrices, and those in groups of their own."""
        found = []
        for group in super().groups(module, settings):
            hidden = [p for p in group["params"] if p in self.matrices]
            others = [p for p in group["params"] if p not in self.matrices]
            own = {"label": "matrices", "states": ("momentum",), "lr_ratio": settings.matrix_lr / settings.lr}
            found += [group | {"params": hidden} | own] * bool(hidden) + [group | {"params": others}] * bool(others)
        return found

    def precondition(self, masters: list[Tensor], group: dict[str, Any]) -> None:
        """Gradients of hidden matrices become their orthogonalised momentum, computed in the precision of the forward pass."""
        if group["label"] != "matrices":
            return
        keep = self.settings.momentum
        gradients = [_gradient(master) for master in masters]
        for master, gradient in zip(masters, gradients, strict=True):
            momentum = self.state[master]["momentum"].view(-1)
            momentum.lerp_(gradient, 1 - keep)
            gradient.lerp_(momentum, keep)
        if self.whole is None:
            self.whole = WholeMatrices.alone(self.matrices)
        self.whole.map_(masters, gradients, orthogonalized)

    def update(self, weight: Tensor, grad: Tensor, states: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Update a piece: of a hidden matrix, whose gradient is orthogonalised already, W <- (1 - lr weight_decay) W - lr g; else AdamW."""
        if group["label"] != "matrices":
            super().update(weight, grad, states, group)
            return
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(grad, alpha=group["lr"])


def _gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad.view(-1)


def hidden_matrices(module: nn.Module) -> dict[Tensor, int]:
    """The weights of the linear maps that say of themselves how many `matrices` they stack, with that number."""
    found: dict[Tensor, int] = {}
    for child in module.modules():
        count = getattr(child, "matrices", None)
        if count is not None:
            assert isinstance(child, nn.Linear)
            found[child.weight] = count
    return found


def orthogonalized(matrices_NRC: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices [N, rows, columns], roughly, times sqrt(max(1, rows / columns)); in the input's dtype."""
    rows, columns = matrices_NRC.shape[-2:]
    x_NSL = matrices_NRC.mT if rows > columns else matrices_NRC
    precise = torch.promote_types(x_NSL.dtype, torch.float32)
    norm_N11 = torch.linalg.vector_norm(x_NSL, dim=(-2, -1), keepdim=True, dtype=precise)
    x_NSL = x_NSL / norm_N11.clamp_min(SMALLEST_NORM).to(x_NSL.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram_NSS = x_NSL @ x_NSL.mT
        factor_NSS = torch.baddbmm(gram_NSS, gram_NSS, gram_NSS, beta=b, alpha=c)
        x_NSL = torch.baddbmm(x_NSL, factor_NSS, x_NSL, beta=a)
    scaled_NSL = x_NSL * max(1.0, rows / columns) ** 0.5
    return scaled_NSL.mT if rows > columns else scaled_NSL
