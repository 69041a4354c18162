"""Who holds what: DeepSpeed's partitions as ranges of named parameters. The one place that reads where DeepSpeed keeps
its flat tensors; what of its inside is set aside or put right is in engine.py.

Every ZeRO stage keeps the fp32 masters, and the optimizer's states beside them, as flat tensors ("flats") in which parameters,
or this rank's pieces of them, lie one behind the other, with padding between or after. A `Held` range (held.py) says: elements
[start, start + numel) of the flattened parameter `name` are elements [offset, offset + numel) of flat number `flat`.
With these, saving, restoring, the gradient norm and the EMA swap need not know the stage:

| stage | flats | a rank holds |
|---|---|---|
| 0 | one per parameter | everything; for writing and counting, an even share of each parameter (`owned`) |
| 1, 2 (and bf16 at 1) | one per parameter group | one piece of the group, wherever parameters begin and end |
| 3 | one per sub-group | the rank's piece of every parameter |

A flat belongs to one parameter group, and a state of it is a tensor of the same length, so whatever states the optimizer
declares (optim.py) are saved and restored by the same ranges.

Written against DeepSpeed 0.19.8 and checked by tests/pretrain/engine/test_engine.py, stage by stage.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from pretrain.engine.file_memory import in_file
from pretrain.engine.held import Held
from pretrain.engine.optim import EMA, WEIGHT, Optimizer, full_shape
from pretrain.engine.parameter import Parameter

SWAP_CHUNK = 1 << 22
"""Elements exchanged at a time (16 MiB of fp32): the only extra memory that evaluation with the EMA needs."""


class Partition:
    """This rank's part of the weights and of the optimizer's states; subclasses know one kind of ZeRO each.

    Attributes: `parameters` name -> Parameter, the whole model's; `flats` the fp32 masters; `held` the ranges that this
    rank keeps; `owned` those that it writes and counts, which over all ranks cover every parameter exactly once.
    `files`: a folder in whose files masters, their gradients and all states are kept, or None.
    """

    def __init__(
        self,
        names: dict[nn.Parameter, str],
        groups: dict[str, int],
        optimizer: Any,
        base: Optimizer,
        files: Path | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.base = base
        self.files = files
        self.parameters = {}
        for p, name in names.items():
            group = base.param_groups[groups[name]]
            self.parameters[name] = Parameter(full_shape(p), group["decays"], base.states_of(group))
        self.flats = self._flats()
        self.held = list(self._held(names))
        self.owned = self.held
        for index, master in enumerate(self.flats):
            self.base.create_state([master], self._group(index))
            if files is not None:
                self._keep_in_files(master, files)

    def _keep_in_files(self, master: Tensor, folder: Path) -> None:
        state = self.base.state[master]
        state |= {name: in_file(tensor, folder) for name, tensor in state.items() if tensor.shape == master.shape}
        master.data = in_file(master.data, folder)
        if master.grad is not None:
            master.grad.data = in_file(master.grad.data, folder)

    def states(self, index: int) -> tuple[str, ...]:
        """Names of the states of flat tensor number `index`, "weight" first and "ema" last."""
        return self.base.states_of(self._group(index))

    def flat(self, state: str, index: int) -> Tensor:
        """Flat tensor number `index` of one of its states, one-dimensional, live."""
        master = self.flats[index]
        return (master if state == WEIGHT else self.base.state[master][state]).detach().view(-1)

    def views(self, ranges: list[Held] | None = None) -> Iterator[tuple[str, Held, Tensor]]:
        """Live one-dimensional views, with the state's name, of every state of the held ranges or of those given."""
        for held in self.held if ranges is None else ranges:
            for state in self.states(held.flat):
                yield state, held, self.flat(state, held.flat).narrow(0, held.offset, held.numel)

    def squared_gradient_norm(self) -> Tensor:
        """This rank's share of the squared global gradient norm, in float64."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in self._owned_gradients()]
        return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)

    def swap_weights_and_ema(self) -> None:
        """Exchange masters and EMA in place, chunk by chunk, and give the model the new masters. Collective."""
        for index in range(len(self.flats)):
            weight, ema = self.flat(WEIGHT, index), self.flat(EMA, index)
            for start in range(0, weight.numel(), SWAP_CHUNK):
                a, b = weight[start : start + SWAP_CHUNK], ema[start : start + SWAP_CHUNK]
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        self.publish()

    def publish(self) -> None:
        """Make the model compute with the masters as they are now. Collective."""
        raise NotImplementedError

    def keep_parameters_in_files(self, folder: Path) -> None:
        """Move the parameters that the host holds between uses (stage 3) into files in this folder."""
        raise NotImplementedError

    def forget_gradients(self) -> None:
        """After a step: a parameter that gets no gradient in the next one must find zeros, not this one's gradient."""

    def _zero_masters_gradients(self) -> None:
        """With offloading, gradients are copied into the masters' own, and those of unused parameters are not."""
        for master in self.flats:
            if master.grad is not None:
                master.grad.zero_()

    def _flats(self) -> list[Tensor]:
        raise NotImplementedError

    def _group(self, index: int) -> dict[str, Any]:
        """The parameter group to which flat tensor number `index` belongs; unless a stage knows better, the one of that number."""
        return self.base.param_groups[index]

    def _held(self, names: dict[nn.Parameter, str]) -> Iterator[Held]:
        raise NotImplementedError

    def _owned_gradients(self) -> Iterator[Tensor]:
        raise NotImplementedError


class Replicated(Partition):
    """Stage 0: every rank has all of the model and of the optimizer; the work of writing is shared out evenly."""

    def __init__(self, *args: Any, rank: int, world_size: int) -> None:
        super().__init__(*args)
        self.owned = []
        for held in self.held:
            begin, end = held.numel * rank // world_size, held.numel * (rank + 1) // world_size
            if end > begin:
                self.owned.append(Held(held.name, begin, end - begin, held.flat, begin))

    def publish(self) -> None:
        pass

    def _flats(self) -> list[Tensor]:
        self._group_of_flat = [group for group in self.base.param_groups for _ in group["params"]]
        return [p for group in self.base.param_groups for p in group["params"]]

    def _group(self, index: int) -> dict[str, Any]:
        return self._group_of_flat[index]

    def _held(self, names: dict[nn.Parameter, str]) -> Iterator[Held]:
        for index, p in enumerate(self.flats):
            yield Held(names[p], 0, p.numel(), index, 0)  # type: ignore[index]

    def _owned_gradients(self) -> Iterator[Tensor]:
        for held in self.owned:
            gradient = self.flats[held.flat].grad
            if gradient is not None:
                yield gradient.view(-1)[held.offset : held.offset + held.numel]


class FlatGroups(Partition):
    """Stages 1 and 2, and the separate optimizer that DeepSpeed uses for bf16 at stage 1."""

    @property
    def _is_bf16_stage_1(self) -> bool:
        return hasattr(self.optimizer, "fp32_groups_flat_partition")

    @property
    def _model_groups(self) -> list[list[nn.Parameter]]:
        return self.optimizer.bf16_groups if self._is_bf16_stage_1 else self.optimizer.bit16_groups

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def forget_gradients(self) -> None:
        if getattr(self.optimizer, "cpu_offload", False):
            self._zero_masters_gradients()

    def _keep_in_files(self, master: Tensor, folder: Path) -> None:
        super()._keep_in_files(master, folder)
        for group, flat in zip(self._model_groups, self.flats, strict=True):
            for p in group if flat is master else ():
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:  # holds a view of the master, and with it the memory that it had
                    piece = mapping.hp_fragment_address
                    mapping.hp_fragment = master.data.narrow(0, piece.start, piece.numel)
        self.optimizer._get_offload_gradient_dict()  # views of the masters' gradients, likewise

    def _flats(self) -> list[Tensor]:
        if self._is_bf16_stage_1:
            return self.optimizer.fp32_groups_flat_partition
        return self.optimizer.single_partition_of_fp32_groups

    def _held(self, names: dict[nn.Parameter, str]) -> Iterator[Held]:
        for index, group in enumerate(self._model_groups):
            for p in group:
                mapping = p._hp_mapping  # type: ignore[attr-defined]
                if mapping is not None:
                    within, piece = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Held(names[p], within.start, within.numel, index, piece.start)

    def _owned_gradients(self) -> Iterator[Tensor]:
        if self._is_bf16_stage_1:
            yield from self.optimizer.fp32_groups_gradient_flat_partition
        elif self.optimizer.cpu_offload:
            yield from (master.grad for master in self.flats if master.grad is not None)
        else:
            for index in range(len(self.flats)):
                yield from self.optimizer.averaged_gradients[index]


class Stage3(Partition):
    """Stage 3: each parameter is cut into equal pieces, one per rank, the last ones padded."""

    def publish(self) -> None:
        # As in DeepSpeed's own step: release what is gathered, refill the pieces, gather the persistent ones.
        self.optimizer._partition_all_parameters()
        for index in range(len(self.flats)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if self.optimizer.persistent_parameters:
            self.optimizer.persistent_parameters[0].all_gather(self.optimizer.persistent_parameters)

    def forget_gradients(self) -> None:
        self.optimizer.grad_partitions_flat_buffer.zero_()
        if self.optimizer.offload_optimizer:
            self._zero_masters_gradients()

    def keep_parameters_in_files(self, folder: Path) -> None:
        flats = self.optimizer.fp16_partitioned_groups_flat
        for index in range(len(flats)):
            flats[index] = in_file(flats[index], folder)
            self.optimizer._unflatten_partitioned_parameters(index)
        self.optimizer.param_groups_fp16_flat_cpu_memory.clear()

    def _flats(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def _group(self, index: int) -> dict[str, Any]:
        return self.base.param_groups[self.optimizer.sub_group_to_group_id[index]]

    def _held(self, names: dict[nn.Parameter, str]) -> Iterator[Held]:
        for group in self.optimizer.fp16_groups:
            for p in group:
                index, offset, piece = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
                start = self.optimizer._get_param_partition_rank(p) * piece
                numel = min(piece, p.ds_numel - start)
                if numel > 0:
                    yield Held(names[p], start, numel, index, offset)

    def _owned_gradients(self) -> Iterator[Tensor]:
        if self.optimizer.offload_optimizer:
            for held in self.owned:
                gradient = self.flats[held.flat].grad
                if gradient is not None:
                    yield gradient[held.offset : held.offset + held.numel]
            return
        pieces = {}
        for index, group in enumerate(self.optimizer.fp16_groups):
            for p, gradient in zip(group, self.optimizer.averaged_gradients[index], strict=True):
                _, offset, _ = self.optimizer.grad_position[self.optimizer.get_param_id(p)]
                pieces[index, offset] = gradient
        for held in self.owned:  # without the padding, which is not always zero
            yield pieces[held.flat, held.offset].view(-1)[: held.numel]


def partition_of(
    names: dict[nn.Parameter, str],
    groups: dict[str, int],
    optimizer: Any,
    base: Optimizer,
    rank: int,
    world_size: int,
    files: Path | None = None,
) -> Partition:
    """The partition of a DeepSpeed engine's optimizer (`engine.optimizer`), around the `base` optimizer inside it.

    `groups`: the number of each parameter's group in `base.param_groups`, from which DeepSpeed takes the parameters out.
    """
    if optimizer is base:
        return Replicated(names, groups, optimizer, base, rank=rank, world_size=world_size)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return Stage3(names, groups, optimizer, base, files)
    if hasattr(optimizer, "single_partition_of_fp32_groups") or hasattr(optimizer, "fp32_groups_flat_partition"):
        return FlatGroups(names, groups, optimizer, base, files)
    raise UserError(
        f"DeepSpeed chose {type(optimizer).__name__}, whose partitions are not known here: change train.zero_stage"
    )
