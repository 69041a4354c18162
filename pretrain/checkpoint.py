"""Checkpoints: finding the newest complete one, restoring it into any sharding, reading it without DeepSpeed.

    python -m pretrain.checkpoint inspect runs/vae_base      what is in the newest checkpoint
    python -m pretrain.checkpoint verify runs/vae_base       read every byte of it

What the files are: slices.py. How they are written while training goes on: checkpoint_writer.py.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from data_pipeline.errors import UserError, cli
from pretrain.checkpoint_writer import CheckpointWriter
from pretrain.distributed import Topology, all_reduce_sum, any_rank, barrier
from pretrain.optim import STATES
from pretrain.slices import (
    FOLDER,
    MANIFEST,
    Manifest,
    SliceReader,
    check_hashes,
    check_sizes,
    folder_name,
    read_manifest,
    remove_checkpoint,
    saved_steps,
    write_atomically,
)

if TYPE_CHECKING:
    from pretrain.engine import Engine
    from pretrain.partition import Partition

__all__ = [
    "CheckpointWriter",
    "Manifest",
    "discard_after",
    "newest_complete",
    "read_manifest",
    "read_tensors",
    "restore",
    "verify",
]


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def newest_complete(
    run: Path, topology: Topology | None = None, report: Callable[[str], None] = _to_stderr
) -> Path | None:
    """The newest checkpoint of a run whose manifest, sizes and hashes are right; None if there is none.

    Each one passed over goes to `report` with its name and the reason. With a topology it is collective: rank 0 chooses
    the candidates, the ranks share the hashing, and all get the same answer.
    """
    folder, rank, world_size = (
        Path(run) / FOLDER,
        topology.rank if topology else 0,
        topology.world_size if topology else 1,
    )
    if rank == 0:
        for leftover in sorted(folder.glob("step-*.*")):
            report(f"{leftover} passed over: the save was not finished")
    steps = [step for step, _ in saved_steps(folder)] if rank == 0 else []
    while True:
        # Rank 0's list decides: on a network file system another rank may see other folders for a moment.
        step = float(steps.pop(0)) if steps else -1.0
        if topology:
            step = all_reduce_sum([step if rank == 0 else 0.0])[0]
        if step < 0:
            return None
        path = folder / folder_name(int(step))
        reason = None
        try:
            manifest = read_manifest(path)
            if manifest.step != step:
                raise UserError(f"{path} says in its manifest that it is step {manifest.step}")
            check_sizes(manifest)
            check_hashes(manifest, rank, world_size)
        except (UserError, OSError) as error:
            reason = str(error)
            report(f"{path} passed over: {reason}")
        if not (any_rank(reason is not None) if topology else reason):
            return path


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


def discard_after(run: Path, step: int, topology: Topology | None = None) -> None:
    """Before a rewind to `step`: remove the later checkpoints, a continuation given up. Collective with a topology."""
    if topology is None or topology.is_main:
        folder = Path(run) / FOLDER
        for saved, path in saved_steps(folder):
            if saved > step:
                remove_checkpoint(path)
        for _, newest in saved_steps(folder)[:1]:
            write_atomically(folder / "latest", f"{newest.name}\n")
    if topology is not None:
        barrier()


def read_tensors(path: Path, state: str = "ema", buffers: bool = True) -> dict[str, Tensor]:
    """Full fp32 tensors by name, as for `load_state_dict`, of a run's newest checkpoint or of a checkpoint's folder.

    Args:
        state: "ema", "weight", "exp_avg" or "exp_avg_sq".
        buffers: also the module's buffers and what was saved beside them.
    """
    manifest = read_manifest(_checkpoint_of(Path(path)))
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


def _checkpoint_of(path: Path) -> Path:
    if (path / MANIFEST).exists():
        return path
    found = newest_complete(path)
    if found is None:
        raise UserError(f"{path} is neither a checkpoint (with {MANIFEST}) nor a run with a complete one in {FOLDER}/")
    return found


def _describe(manifest: Manifest) -> str:
    num_parameters = sum(manifest.shape(name).numel() for name in manifest.parameters)
    num_bytes = sum(file["bytes"] for file in manifest.files.values())
    lines = [
        f"{manifest.path}: step {manifest.step:,}, saved by {manifest.world_size} rank(s), "
        f"ZeRO-{manifest.zero_stage}, {manifest.precision}",
        f"{num_parameters:,} parameters in {len(manifest.parameters)} tensors, states {', '.join(manifest.states)}; "
        f"{num_bytes / 1e6:,.1f} MB in {len(manifest.files)} file(s)",
        f"versions {manifest.versions}; kept beside: {', '.join(manifest.extra) or 'nothing'}",
    ]
    for name, parameter in manifest.parameters.items():
        lines.append(f"  {name:<60} {parameter['shape']!s:<20} {'decay' if parameter['decays'] else 'no decay'}")
    return "\n".join(lines)


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line: inspect or verify a checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.checkpoint", description="Look into a checkpoint without DeepSpeed."
    )
    parser.add_argument("action", choices=["inspect", "verify"])
    parser.add_argument("path", type=Path, help="a run's folder (its newest checkpoint) or a checkpoint's folder")
    arguments = parser.parse_args(argv)
    path = _checkpoint_of(arguments.path)
    if arguments.action == "inspect":
        print(_describe(read_manifest(path)))
    else:
        manifest = verify(path)
        print(f"{path}: complete and unaltered; {len(manifest.files)} file(s), step {manifest.step:,}")


if __name__ == "__main__":
    sys.exit(main(None))
