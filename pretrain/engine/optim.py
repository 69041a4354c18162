"""AdamW with an exponential moving average of the weights as one more optimizer state, and the learning-rate schedule.

The EMA lives in `state[p]["ema"]`, next to Adam's moments, so whatever shards, offloads, saves or restores those does
the same for it: ZeRO hands the optimizer flat pieces of the fp32 masters, and the EMA is a piece of the same shape.
All numbers that change with the step (learning rate, EMA decay, clipping) are pure functions of the step, set from
outside before each update; no scheduler has a state to save.
"""

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import Section, Share

STATES = ("weight", "exp_avg", "exp_avg_sq", "ema")
"""What belongs to a parameter: the fp32 master, Adam's two moments, and the EMA of the master."""

_PIECE = 1 << 15
"""Elements that an update on the CPU takes at a time: seven tensors of them fit a core's second-level cache."""


class Optimizer(Section):
    """AdamW on fp32 masters, with the EMA as one more state."""

    lr: PositiveFloat
    """Peak learning rate [paper, stage 1: 1e-4]."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment, each in [0, 1)."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.01
    """On matrices; biases, norms and embeddings are exempt [paper, stage 1: 0.01]."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 leaves gradients as they are."""
    ema_decay: Share = 0.9999
    """Share of the average that a step keeps."""
    ema_warmup: bool = True
    """Decay at step s is min(ema_decay, (1 + s) / (10 + s)): a young average forgets its random start faster."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas are {list(self.betas)}; each must lie in [0, 1)")
        if self.ema_decay == 1:
            raise ValueError(
                "optimizer.ema_decay is 1, which keeps the first weights for ever; expected below 1, e.g. 0.9999"
            )
        return self

    def ema_decay_at(self, step: int) -> float:
        """Decay used by update number `step` (from 0): min(ema_decay, (1 + step) / (10 + step)) with warm-up."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.ema_warmup else self.ema_decay


class Schedule(Section):
    """Learning rate over the run: linear warm-up, then a shape."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """wsd: constant, then linear decay at the end (warm-up, stable, decay)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    min_ratio: Share = 0.0
    """Last learning rate over the peak."""
    decay_steps: NonNegativeInt = 0
    """Steps of the decay; 0: all after the warm-up (cosine), the last tenth (wsd)."""


def learning_rate(step: int, peak: float, schedule: Schedule, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Warm-up rises as (step + 1) / warmup_steps, so that no update is wasted at rate 0. `decay_steps` is the length of
    the decay: for cosine 0 means all steps after the warm-up, for wsd 0 means the last tenth of `total_steps`. After
    the decay the rate stays at `min_ratio * peak`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        start = schedule.warmup_steps
        length = schedule.decay_steps or total_steps - start
    else:
        length = schedule.decay_steps or max(1, total_steps // 10)
        start = max(schedule.warmup_steps, total_steps - length)
    progress = min(1.0, max(0.0, (step - start) / max(1, length)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * remaining)


class AdamWithEMA(torch.optim.AdamW):
    """torch's AdamW on whatever tensors it is given, with the EMA as a third state.

    Three attributes are set before each update, by whoever knows the step: `ema_decay`; `clip_factor`, by which the
    gradients are multiplied first (clipping); and `skip`, under which `step()` changes nothing at all. Skipping here,
    below DeepSpeed, lets it run its usual path and release its buffers. `step()` counts nothing, because ZeRO-1/2 call
    it once per parameter group and ZeRO-3 once per sub-group.
    """

    ema_decay: float = 0.0
    clip_factor: float = 1.0
    skip: bool = False

    def create_state(self, params: Iterable[Tensor]) -> None:
        """Make every state now (EMA = weights), so that memory use is known and saving works before the first step."""
        for p in params:
            if not self.state[p]:
                on_device = bool(self.defaults["fused"] or self.defaults["capturable"])
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device if on_device else "cpu"),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "ema": p.detach().clone(),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the current groups' tensors and of their EMA, or nothing at all if `skip` is set."""
        if self.skip:
            return
        both = [(p, group) for group in self.param_groups for p in group["params"]]
        self.create_state(p for p, _ in both)
        for p, _ in both:
            if p.grad is not None and self.clip_factor != 1.0:
                p.grad.mul_(self.clip_factor)
        if self.defaults["fused"]:
            super().step()
        for p, group in both:
            if self.defaults["fused"] or p.grad is None:
                self.state[p]["ema"].lerp_(p, 1 - self.ema_decay)
            else:
                self._update(p, p.grad, group)

    def _update(self, p: Tensor, grad: Tensor, group: dict) -> None:
        """torch's AdamW, operation by operation, then the EMA, piece by piece: every state passes through the cache once."""
        state = self.state[p]
        state["step"] += 1
        (beta1, beta2), step = group["betas"], float(state["step"])
        shrink, step_size = 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**step)
        root_correction = (1 - beta2**step) ** 0.5
        tensors = (p, grad, state["exp_avg"], state["exp_avg_sq"], state["ema"])
        for weight, slope, mean, square, ema in zip(*(x.reshape(-1).split(_PIECE) for x in tensors), strict=True):
            weight.mul_(shrink)
            mean.lerp_(slope, 1 - beta1)
            square.mul_(beta2).addcmul_(slope, slope, value=1 - beta2)
            weight.addcdiv_(mean, (square.sqrt() / root_correction).add_(group["eps"]), value=-step_size)
            ema.lerp_(weight, 1 - self.ema_decay)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, with and without weight decay, in the order of `named_parameters` (trainable ones only).

    No decay for vectors and scalars (norms, biases), for embedding tables, and for parameters that carry an attribute
    `no_weight_decay = True`. A tied embedding counts as an embedding.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for _, p in module.named_parameters():
        if p.requires_grad:
            # Under zero.Init a partitioned parameter is an empty vector; its real shape is in ds_shape.
            ndim = len(getattr(p, "ds_shape", p.shape))
            decays = ndim >= 2 and id(p) not in embeddings and not getattr(p, "no_weight_decay", False)
            groups[decays].append(p)
    if not groups[True] and not groups[False]:
        raise UserError("the model has no trainable parameter; was everything frozen?")
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "decays": decays}
        for decays, params in groups.items()
        if params
    ]


def build_optimizer(module: nn.Module, settings: Optimizer, fused: bool = False) -> AdamWithEMA:
    """AdamW over the trainable parameters of `module`, in the groups of `parameter_groups`.

    `fused`: one kernel per tensor, for GPUs. On CPUs its result depends on where a shard begins (vector or scalar code).
    """
    groups = parameter_groups(module, settings.weight_decay)
    # One tensor after the other: the multi-tensor kernels hold a temporary as large as all gradients, and under ZeRO
    # a group is one flat tensor anyway.
    return AdamWithEMA(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, foreach=False, fused=fused)
