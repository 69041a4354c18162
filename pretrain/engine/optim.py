"""What an optimizer is, to the engine, to ZeRO's partitions and to checkpoints.

An optimizer is a class below `Optimizer`. It declares by name what it keeps of each element of a parameter (`states`,
fp32), and says how a piece of weights changes by a piece of gradients (`update`). All else is common: the groups with
and without weight decay, clipping, skipping, and the moving average of the weights (EMA), which is one more state. ZeRO
hands an optimizer flat pieces of the fp32 masters; every state is a piece of the same shape, so whatever shards,
offloads, saves or restores one of them does the same for all.

All numbers that change with the step (learning rate, EMA decay, clipping) are functions of the step, set from outside
before each update (`prepare`); no scheduler has a state to save.
"""

import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from pretrain.engine.matrices import WholeMatrices
from pretrain.engine.optimizer_settings import OptimizerSettings

WEIGHT, EMA = "weight", "ema"
"""What every parameter has, whatever the optimizer: the fp32 master, and the moving average of it."""

_PIECE = 1 << 15
"""Elements that an update on the CPU takes at a time: seven tensors of them fit a core's second-level cache."""


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers, over the trainable parameters of a module.

    Its settings name it by its place (optimizer_settings.py). A subclass has:
        states: names of what it keeps per element, zero before the first update. A group's own key "states" goes first.
        update: the change of one flat piece.
        groups: how parameters are grouped, where `parameter_groups` is not enough.
        matrices, precondition: where an update is not element by element: the parameters that are to be seen as whole
            matrices, with the number that is stacked in each, and what is done with them through `whole` (matrices.py).

    `step()` may be called once for all groups, once per group (ZeRO 1, 2) or once per sub-group (ZeRO 3), so nothing
    is counted in it.
    """

    states: ClassVar[tuple[str, ...]] = ()
    matrices: Mapping[Tensor, int] = MappingProxyType({})
    whole: WholeMatrices | None = None

    def __init__(self, module: nn.Module, settings: Any) -> None:
        self.settings = settings
        super().__init__(self.groups(module, settings), {"lr": settings.lr})
        self.prepare(1, settings.lr, settings.ema_decay_at(0), skip=True)

    def groups(self, module: nn.Module, settings: Any) -> list[dict[str, Any]]:
        """Parameter groups: "params", "weight_decay", "decays" (for the record), "label", and what `update` reads; where they
        are not the settings' and the class's, "lr_ratio" (to the run's learning rate) and "states"."""
        return parameter_groups(module, settings.weight_decay)

    def update(self, weight: Tensor, grad: Tensor, states: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change a piece of weights and its states in place; all are fp32 of one dimension and of one length.

        Where a piece begins and ends is ZeRO's and the cache's affair: the result must not depend on it. `self.number`
        is the number of this update, from 1; `group` holds "lr" and "weight_decay".
        """
        raise NotImplementedError

    def precondition(self, masters: list[Tensor], group: dict[str, Any]) -> None:
        """Before the pieces of a group are updated: change, in place, the gradients of its flats, which all have one.

        Called with the same flats on every rank at the same time, so it may be collective.
        """

    def prepare(self, number: int, lr: float, ema_decay: float, clip_factor: float = 1.0, skip: bool = False) -> None:
        """Before each `step()`: set the number of this update (from 1, skipped ones not counted), the learning rate, the
        EMA's decay and the factor of the gradients. With `skip`, `step()` changes nothing at all.

        Skipping here, below DeepSpeed, lets it run its usual path and release its buffers.
        """
        self.number, self.ema_decay, self.clip_factor, self.skip = number, ema_decay, clip_factor, skip
        for group in self.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0)

    def states_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of all numbers kept for an element of this group: "weight", the optimizer's own states, "ema"."""
        return (WEIGHT, *group.get("states", self.states), EMA)

    def create_state(self, params: Iterable[Tensor], group: dict[str, Any]) -> None:
        """Make every state now (EMA = weights), so that memory use is known and saving works before the first step."""
        for p in params:
            if not self.state[p]:
                own = self.states_of(group)[1:-1]
                self.state[p] = {name: torch.zeros_like(p) for name in own} | {EMA: p.detach().clone()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the current groups' tensors and of their EMA, or nothing at all if it is to be skipped."""
        if self.skip:
            return
        for group in self.param_groups:
            self.create_state(group["params"], group)
            masters = [p for p in group["params"] if p.grad is not None]
            if self.clip_factor != 1.0:
                for p in masters:
                    p.grad.mul_(self.clip_factor)
            self.precondition(masters, group)
            for p in group["params"]:
                self._update_flat(p, group)

    def _update_flat(self, p: Tensor, group: dict[str, Any]) -> None:
        """Update and EMA, on the CPU piece by piece, so that every state passes through the cache once."""
        state, names = self.state[p], self.states_of(group)[1:]
        if p.grad is None:
            state[EMA].lerp_(p, 1 - self.ema_decay)
            return
        size = max(1, p.numel()) if p.is_cuda else _PIECE
        tensors = (p.view(-1), p.grad.reshape(-1), *(state[name].view(-1) for name in names))
        for weight, grad, *own in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            states = dict(zip(names, own, strict=True))
            self.update(weight, grad, states, group)
            states[EMA].lerp_(weight, 1 - self.ema_decay)


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimizer that the settings name, over the trainable parameters of `module`."""
    return pkgutil.resolve_name(settings.optimizer)(module, settings)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, in the order of `named_parameters` (trainable ones only).

    No decay for vectors and scalars (norms, biases), for embedding tables, and for parameters that carry an attribute
    `no_weight_decay = True`. A tied embedding counts as an embedding. Raises: UserError if everything is frozen.
    """
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for p in trainable(module):
        decays = len(full_shape(p)) >= 2 and id(p) not in embeddings and not getattr(p, "no_weight_decay", False)
        groups[decays].append(p)
    return [
        {
            "params": params,
            "weight_decay": weight_decay if decays else 0.0,
            "decays": decays,
            "label": "decay" if decays else "no decay",
        }
        for decays, params in groups.items()
        if params
    ]


def trainable(module: nn.Module) -> Sequence[nn.Parameter]:
    """The module's parameters that require gradients. Raises: UserError if there is none."""
    found = [p for p in module.parameters() if p.requires_grad]
    if not found:
        raise UserError("the model has no trainable parameter; was everything frozen?")
    return found


def full_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter: what ZeRO 3 has partitioned is an empty vector, its real shape in `ds_shape`."""
    return tuple(getattr(p, "ds_shape", p.shape))
