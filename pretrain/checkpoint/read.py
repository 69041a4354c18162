"""Checkpoints: finding the newest complete one, restoring it into any sharding, reading it without DeepSpeed.

    textldm checkpoint inspect runs/vae_base      what is in the newest checkpoint
    textldm checkpoint verify runs/vae_base       read every byte of it

What the files are: slices.py. How they are written while training goes on: checkpoint_writer.py.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.slices import Manifest, SliceReader, check_hashes, check_sizes, read_manifest
from pretrain.engine.optim import STATES
from pretrain.ranks.distributed import barrier

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine
    from pretrain.engine.partition import Partition


def restore(path: Path, engine: "Engine") -> Manifest:
    """Load weights, moments, EMA, AdamW's counter and the stage's buffers, by whatever sharding they were saved.

    Every rank reads only what overlaps its own ranges. Collective. Returns the manifest, with `extra` and `step`.
    Raises: UserError naming what does not fit: parameters, shapes, weight decay groups, missing ranges.
    """
    manifest = read_manifest(Path(path))
    partition = engine.partition
    _check_fits(manifest, partition)
    with SliceReader(manifest) as reader:
        for state in STATES:
            for held, view in partition.views(state):
                reader.read_into(view, state, held.name, held.start)
        saved_buffers, buffers = reader.buffers(), engine.buffers()
        for name, buffer in buffers.items():
            if name not in saved_buffers or saved_buffers[name].shape != buffer.shape:
                found = list(saved_buffers[name].shape) if name in saved_buffers else "none"
                raise UserError(f"{path} has buffer {name} of shape {found}, the model wants {list(buffer.shape)}")
            buffer.copy_(saved_buffers[name])
    partition.adam_step = manifest.adam_step
    partition.publish()
    barrier()
    return manifest


def _check_fits(manifest: Manifest, partition: "Partition") -> None:
    wanted, saved = partition.parameters, manifest.parameters
    problems = [f"has {name}, which the model does not have" for name in saved.keys() - wanted.keys()]
    problems += [f"lacks {name}, which the model has" for name in wanted.keys() - saved.keys()]
    for name in wanted.keys() & saved.keys():
        if list(wanted[name].shape) != saved[name]["shape"]:
            problems.append(f"has {name} of shape {saved[name]['shape']}, the model wants {list(wanted[name].shape)}")
        elif wanted[name].decays != saved[name]["decays"]:
            before, now = (("without", "with")[decays] for decays in (saved[name]["decays"], wanted[name].decays))
            problems.append(f"trained {name} {before} weight decay, the model wants it {now}")
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else "")
        raise UserError(f"checkpoint {manifest.path} {shown}: resume with the configuration it was saved with")


def read_tensors(path: Path, state: str = "ema", buffers: bool = True) -> dict[str, Tensor]:
    """Full fp32 tensors by name, as for `load_state_dict`, of a run's newest checkpoint or of a checkpoint's folder.

    Args:
        state: "ema", "weight", "exp_avg" or "exp_avg_sq".
        buffers: also the module's buffers and what was saved beside them.
    """
    manifest = read_manifest(checkpoint_of(Path(path)))
    if state not in manifest.states:
        raise UserError(f"{manifest.path} has no state {state!r}; it has {', '.join(manifest.states)}")
    check_sizes(manifest)
    with SliceReader(manifest) as reader:
        tensors = {name: reader.full(state, name) for name in manifest.parameters}
        tensors |= {alias: tensors[name] for alias, name in manifest.aliases.items()}
        return tensors | reader.buffers() if buffers else tensors


def verify(path: Path) -> Manifest:
    """Check hashes, sizes and that every element of every state is there. Raises: UserError with the reason."""
    manifest = read_manifest(path)
    check_sizes(manifest)
    check_hashes(manifest)
    with SliceReader(manifest) as reader:
        for state in manifest.states:
            for name in manifest.parameters:
                reader.full(state, name)
    return manifest
