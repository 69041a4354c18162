"""Bytes that weights, gradients and optimizer states take on a rank, by ZeRO stage, and what ranks tell one another in a step.

As DeepSpeed 0.19.8 allocates them under pretrain/engine/settings.py, measured by `python -m benchmarks.plan`. P parameters,
M bytes of a parameter in the model (bf16 2, fp32 4), S bytes of all fp32 states of the optimizer, master and EMA among them, W ranks:

| stage | weights | gradients | states | buffers |
|---|---|---|---|---|
| 0 | 4 P | 4 P | S - 4 P, as the weights are the masters | |
| 1, fp32 | 4 P | 4 P / W, while micro-batches accumulate 4 P | S / W | a bucket of gradients |
| 1, bf16 | 2 P | 4 P, and the bf16 ones until the step, 2 P | S / W | |
| 2 | M P | 4 P / W | S / W | a bucket of gradients |
| 3 | M P / W | 4 P / W | S / W | a bucket of gradients, whole small parameters, those gathered for use |
"""

from dataclasses import dataclass

from torch import nn

from pretrain.engine.optim import build_optimizer
from pretrain.engine.optimizer_settings import OptimizerSettings
from pretrain.engine.settings import MAX_BUCKET

PERSISTENT, LIVE = 100_000, 1_000_000_000
"""DeepSpeed's stage3_param_persistence_threshold and stage3_max_live_parameters, in elements."""


@dataclass(frozen=True)
class Parameters:
    """What is trained, in numbers: elements, those of parameters below `PERSISTENT`, of Muon's matrices, and bytes of all fp32 states."""

    elements: int
    small: int
    matrices: int
    state_bytes: int

    @classmethod
    def of(cls, module: nn.Module, optimizer: OptimizerSettings) -> "Parameters":
        """Of a module, on the meta device too, under an optimizer: its groups say how many states an element has."""
        built = build_optimizer(module, optimizer)
        states = sum(
            4 * len(built.states_of(group)) * sum(p.numel() for p in group["params"]) for group in built.param_groups
        )
        sizes = [p.numel() for p in module.parameters()]
        small = sum(size for size in sizes if size <= PERSISTENT)
        return cls(sum(sizes), small, sum(p.numel() for p in built.matrices), states)


@dataclass(frozen=True)
class States:
    """Bytes on one rank, between steps but for `transient`, which is there during backward or the step."""

    weights: int
    gradients: int
    states: int
    buffers: int
    transient: int

    @property
    def total(self) -> int:
        """While gradients are complete: what must fit beside activations."""
        return self.weights + self.gradients + self.states + self.buffers + self.transient

    @property
    def lasting(self) -> int:
        """Without what comes and goes."""
        return self.total - self.transient


def states(
    parameters: Parameters, stage: int, ranks: int, bf16: bool, accumulates: bool = False, offload: bool = False
) -> States:
    """Of one rank.

    Args:
        accumulates: whether a step has several micro-batches.
        offload: states lie on the host or in files, not on the device.
    """
    count, model = parameters.elements, 2 if bf16 else 4
    bucket = 4 * min(count, MAX_BUCKET)
    share = -(-count // ranks)
    own = 0 if offload else -(-parameters.state_bytes // ranks)
    if stage == 0:
        return States(4 * count, 4 * count, parameters.state_bytes - 4 * count, 0, 0)
    if stage == 1 and bf16:
        return States(2 * count, 6 * count, own, 0, 0)
    if stage == 1:
        return States(4 * count, 4 * share, own, 0, max(bucket, 4 * count if accumulates else 0))
    if stage == 2:
        return States(model * count, 4 * share, own, 0, bucket)
    gathered = model * min(count, LIVE)
    return States(model * share, 4 * share, own, bucket + model * parameters.small, gathered)


def sent_bytes(parameters: Parameters, stage: int, ranks: int, bf16: bool, micro_batches: int = 1) -> float:
    """Bytes that a rank sends in a step, by ring algorithms: (W - 1) / W of what is reduced or gathered, twice for an all-reduce.

    Gradients are reduced in fp32: once a step at stages 0 and 1, after every micro-batch at 2 and 3. Stage 3 gathers the parameters for
    every forward and every backward pass, whose recomputation is by the same gathering. Muon sends its matrices' momentum to whoever
    orthogonalises it and the result back.
    """
    count, model, part = parameters.elements, 2 if bf16 else 4, (ranks - 1) / ranks
    matrices = 2 * 4 * parameters.matrices * part / ranks if ranks > 1 else 0.0
    if stage == 0:
        return 2 * 4 * count * part + matrices
    if stage == 1:
        return (4 + model) * count * part + matrices
    if stage == 2:
        return (4 * micro_batches + model) * count * part + matrices
    return micro_batches * (4 + 2 * model) * count * part + matrices
