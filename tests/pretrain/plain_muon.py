"""Muon by hand, in plain PyTorch: one process, a matrix at a time."""

import torch
from torch import Tensor, nn

from pretrain.engine.optim import parameter_groups
from pretrain.engine.optimizer_settings import MuonSettings


class PlainMuon(torch.optim.AdamW):
    """AdamW for all but the hidden weights, which are left to none of its groups; `hidden`: how many matrices each stacks."""

    def __init__(self, stage: nn.Module, settings: MuonSettings, hidden: dict[Tensor, int]) -> None:
        self.settings, self.hidden = settings, hidden
        groups = parameter_groups(stage, settings.weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in hidden]
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        super().step()
        lr, keep = self.settings.matrix_lr, self.settings.momentum
        for p, count in self.hidden.items():
            state = self.state[p]
            state["momentum"] = keep * state.get("momentum", 0 * p) + (1 - keep) * p.grad
            ahead = (1 - keep) * p.grad + keep * state["momentum"]
            directions = [newton_schulz(matrix) for matrix in ahead.chunk(count)]
            p.mul_(1 - lr * self.settings.weight_decay).sub_(lr * torch.cat(directions))


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five quintic steps, whichever side is longer, and the scale of a tall matrix."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x * max(1.0, len(matrix) / len(matrix.T)) ** 0.5
