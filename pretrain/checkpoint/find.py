"""Checkpoints: finding the newest complete one, restoring it into any sharding, reading it without DeepSpeed.

    textldm checkpoint inspect runs/vae_base      what is in the newest checkpoint
    textldm checkpoint verify runs/vae_base       read every byte of it

What the files are: slices.py. How they are written while training goes on: checkpoint_writer.py.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.slices import (
    FOLDER,
    MANIFEST,
    check_hashes,
    check_sizes,
    folder_name,
    read_manifest,
    remove_checkpoint,
    saved_steps,
    write_atomically,
)
from pretrain.ranks.distributed import Topology, all_reduce_sum, any_rank, barrier

if TYPE_CHECKING:
    pass


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


def checkpoint_of(run: str | Path) -> Path:
    """The newest complete checkpoint of a run folder, or the checkpoint itself when one is named. Raises: UserError."""
    path = Path(run)
    if (path / MANIFEST).is_file():
        return path
    found = newest_complete(path) if path.is_dir() else None
    if found is None:
        raise UserError(
            f"{run} is neither a checkpoint (with {MANIFEST}) nor a run with a complete checkpoint in {FOLDER}/; expected"
            " the folder of a trained run, e.g. runs/vae_base"
        )
    return found
