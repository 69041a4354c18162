"""AdamW (arXiv 1711.05101) on flat pieces of fp32 masters."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from pretrain.engine.optim import Optimizer


class AdamW(Optimizer):
    """Both moments are states, by the names that torch gives them."""

    states = ("exp_avg", "exp_avg_sq")

    def update(self, weight: Tensor, grad: Tensor, states: dict[str, Tensor], group: dict[str, Any]) -> None:
        """torch's AdamW: on GPUs its fused kernel, on CPUs operation by operation.

        The fused kernel's result on a CPU would depend on where a piece begins (vector or scalar code).
        """
        mean, square = states["exp_avg"], states["exp_avg_sq"]
        if weight.is_cuda:
            self.fused(weight, grad, mean, square, group)
            return
        (beta1, beta2), lr = self.settings.betas, group["lr"]
        root_correction = (1 - beta2**self.number) ** 0.5
        weight.mul_(1 - lr * group["weight_decay"])
        mean.lerp_(grad, 1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square.sqrt() / root_correction).add_(self.settings.eps)
        weight.addcdiv_(mean, root, value=-lr / (1 - beta1**self.number))

    def fused(self, weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        """The update by torch's fused kernel, which adds 1 to the count of updates itself."""
        beta1, beta2 = self.settings.betas
        earlier = torch.full((), self.number - 1, dtype=torch.float32, device=weight.device)
        adamw(
            [weight], [grad], [mean], [square], [], [earlier], fused=True, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=self.settings.eps,
        )  # fmt: skip
