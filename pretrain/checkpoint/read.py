"""Reading checkpoints: into an engine, whatever the sharding on either side; or as plain tensors, without one."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from data_pipeline.core.errors import UserError
from modeling.layers import whole
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import Manifest, check_sizes, read_manifest, unaltered
from pretrain.checkpoint.slices import SliceReader
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import shapes_of
from pretrain.engine.engine import Engine
from pretrain.engine.optim import full_shape
from pretrain.engine.partition import Partition
from pretrain.ranks.distributed import barrier


def restore(checkpoint: Checkpoint, engine: Engine) -> Manifest:
    """Load every state of every parameter, the count of updates and the stage's buffers.

    Every rank reads only what overlaps its own ranges. Collective. Returns the manifest, with `extra` and `step`.
    Raises: UserError naming what does not fit: parameters, shapes, weight decay groups, states, missing ranges.
    """
    manifest = read_manifest(checkpoint)
    partition = engine.partition
    _check_fits(manifest, partition)
    with SliceReader(manifest) as reader:
        for state, held, view in partition.views():
            reader.read_into(view, state, held.name, held.start)
        saved_buffers, buffers = reader.buffers(), engine.buffers()
        for name, buffer in buffers.items():
            if name not in saved_buffers or saved_buffers[name].shape != buffer.shape:
                found = list(saved_buffers[name].shape) if name in saved_buffers else "none"
                raise UserError(
                    f"{checkpoint} has buffer {name} of shape {found}, the model wants {list(buffer.shape)}"
                )
            buffer.copy_(saved_buffers[name])
    engine.updates = manifest.updates
    partition.publish()
    barrier()
    return manifest


def _check_fits(manifest: Manifest, partition: Partition) -> None:
    wanted, saved = partition.parameters, manifest.parameters
    problems = [f"has {name}, which the model does not have" for name in saved.keys() - wanted.keys()]
    problems += [f"lacks {name}, which the model has" for name in wanted.keys() - saved.keys()]
    for name in wanted.keys() & saved.keys():
        then, now = saved[name], wanted[name]
        if now.shape != then.shape:
            problems.append(f"has {name} of shape {list(then.shape)}, the model wants {list(now.shape)}")
        elif now.states != then.states:
            problems.append(f"has of {name} {', '.join(then.states)}, the optimizer wants {', '.join(now.states)}")
        elif now.decays != then.decays:
            before, after = (("without", "with")[decays] for decays in (then.decays, now.decays))
            problems.append(f"trained {name} {before} weight decay, the model wants it {after}")
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else "")
        raise UserError(f"checkpoint {manifest.checkpoint} {shown}: resume with the configuration it was saved with")


def read_tensors(run: str | Path | Checkpoint, state: str = "ema", buffers: bool = True) -> dict[str, Tensor]:
    """Full fp32 tensors by name, as for `load_state_dict`, of a checkpoint or of a run's newest.

    Args:
        state: "ema", "weight", or what the optimizer keeps, e.g. "exp_avg"; of the parameters that have it.
        buffers: also the module's buffers.
    """
    checkpoint = run if isinstance(run, Checkpoint) else checkpoint_of(run, state=state)
    manifest = read_manifest(checkpoint)
    with SavedTensors(manifest, state) as saved:
        tensors = {name: saved[name] for name in saved.names}
        tensors |= {alias: tensors[name] for alias, name in manifest.aliases.items() if name in tensors}
        return tensors | saved.buffers if buffers else tensors


class SavedTensors(Mapping[str, Tensor]):
    """What `read_tensors` gives, parameter by parameter: a mapping that reads a tensor when it is asked for. A context manager.

    Attributes:
        shapes: of all tensors by name.
        names: of the parameters that have the state.
        buffers: the module's, which are few and small.

    Raises: UserError for a state that there is not, and for files that are not as the manifest says.
    """

    def __init__(self, manifest: Manifest, state: str) -> None:
        if state not in manifest.states:
            raise UserError(f"{manifest.checkpoint} has no state {state!r}; it has {', '.join(manifest.states)}")
        check_sizes(manifest)
        self._state, self._reader = state, SliceReader(manifest)
        self.names = [name for name, parameter in manifest.parameters.items() if state in parameter.states]
        self.buffers = self._reader.buffers()
        self._owner = {name: name for name in self.names}
        self._owner |= {alias: name for alias, name in manifest.aliases.items() if name in self._owner}
        self.shapes = {name: manifest.shape(owner) for name, owner in self._owner.items()}
        self.shapes |= {name: tuple(buffer.shape) for name, buffer in self.buffers.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name] if name in self.buffers else self._reader.full(self._state, self._owner[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.__exit__()


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], source: Checkpoint | Path) -> None:
    """`load_state_dict`, one tensor after the other: each is asked for when its turn has come, and put where it belongs.

    The model's own tensors among them stay what they are. Of what is held in pieces, one parameter at a time is whole, and rank 0's
    values count: collective then. Raises: UserError, whose one message has all mismatches.
    """
    check_shapes(model, shapes_of(tensors), source)
    with torch.no_grad():
        for name, own in model.state_dict(keep_vars=True).items():
            found = tensors[name]
            if found is not own:
                with whole(own):
                    own.copy_(found)


def check_shapes(model: nn.Module, found: Mapping[str, tuple[int, ...]], source: Checkpoint | Path) -> None:
    """Raise UserError for weights that a model, which may be on the meta device or in pieces, does not have or has in other shapes."""
    wanted = {name: full_shape(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit the model: {'; '.join(wrong[:3])}{more}; check the sizes in its config")


def verify(checkpoint: Checkpoint) -> Manifest:
    """Check hashes, sizes and that every element of every state is there once. Raises: UserError with the reason."""
    manifest = unaltered(checkpoint)
    SliceReader(manifest).__exit__()  # it holds the slices against the manifest when it is opened
    return manifest
