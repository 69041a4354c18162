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

from pretrain.engine.optim import WEIGHT, Optimizer, build_optimizer
from pretrain.engine.optimizer_settings import OptimizerSettings
from pretrain.engine.settings import MAX_BUCKET

PERSISTENT, LIVE = 100_000, 1_000_000_000
"""DeepSpeed's stage3_param_persistence_threshold and stage3_max_live_parameters, in elements."""


@dataclass(frozen=True)
class Parameters:
    """What is trained, in numbers: elements, those of parameters below `PERSISTENT`, of Muon's matrices, and bytes of all fp32 states,
    each by its name: "weight" is the master."""

    elements: int
    small: int
    matrices: int
    bytes_of_state: dict[str, int]

    @classmethod
    def of(cls, module: nn.Module, optimizer: OptimizerSettings) -> "Parameters":
        """Of a module, on the meta device too, under an optimizer."""
        return cls.under(build_optimizer(module, optimizer))

    @classmethod
    def under(cls, optimizer: Optimizer) -> "Parameters":
        """Of an optimizer that is built: its groups say which states an element has."""
        states: dict[str, int] = {}
        for group in optimizer.param_groups:
            for name in optimizer.states_of(group):
                states[name] = states.get(name, 0) + 4 * sum(p.numel() for p in group["params"])
        sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
        small = sum(size for size in sizes if size <= PERSISTENT)
        return cls(sum(sizes), small, sum(p.numel() for p in optimizer.matrices), states)

    @property
    def state_bytes(self) -> int:
        """Of all states."""
        return sum(self.bytes_of_state.values())

    def shares(self, held: int, stage: int) -> dict[str, int]:
        """The bytes of states that a rank holds, by name; at stage 0 the weights themselves are the masters."""
        of = {name: size for name, size in self.bytes_of_state.items() if stage or name != WEIGHT}
        found, whole, before = {}, sum(of.values()), 0
        for name, size in of.items():
            found[name] = held * (before + size) // whole - held * before // whole  # so that they add up
            before += size
        return found


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


def sent(parameters: Parameters, stage: int, ranks: int, bf16: bool, micro_batches: int = 1) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what they are, by ring algorithms: (W - 1) / W of what is reduced or gathered, twice for an
    all-reduce.

    Gradients are reduced in fp32: once a step at stages 0 and 1, after every micro-batch at 2 and 3. Stage 3 gathers the parameters for
    every forward and every backward pass, whose recomputation is by the same gathering. Muon sends its matrices' momentum to whoever
    orthogonalises it and the result back.
    """
    count, model, part = parameters.elements, 2 if bf16 else 4, (ranks - 1) / ranks
    gradients = 4 * count * part * {0: 2, 1: 1}.get(stage, micro_batches)
    gathered = model * count * part * {0: 0, 3: 2 * micro_batches}.get(stage, 1)
    return {"gradients": gradients, "parameters": gathered, "matrices": 2 * 4 * parameters.matrices * part / ranks}


def sent_bytes(parameters: Parameters, stage: int, ranks: int, bf16: bool, micro_batches: int = 1) -> float:
    """All of them."""
    return sum(sent(parameters, stage, ranks, bf16, micro_batches).values())
