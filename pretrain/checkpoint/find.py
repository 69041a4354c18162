"""Which checkpoints there are, which of them is the newest complete one, and which are given up before a rewind.

Without torch, unless ranks agree on something: the supervisor and command lines look for checkpoints, too.
"""

import contextlib
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import MANIFEST, check_hashes, check_sizes, read_manifest, unaltered
from pretrain.checkpoint.storage import CHECKPOINTS, ROOT, Checkpoint, Folder, Storage, storage_of

if TYPE_CHECKING:
    from pretrain.ranks.distributed import Topology

LATEST = "latest"
"""A file beside the checkpoints that names the newest, for people and scripts."""


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after so many steps: step-000000500."""
    return f"step-{step:09d}"


def saved_steps(run: Path) -> list[int]:
    """Steps after which a run has a checkpoint, newest first, unchecked."""
    matches = (re.fullmatch(r"step-(\d{9,})", name) for name in storage_of(run).list())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def unfinished(storage: Storage) -> list[str]:
    """Names of what killed saves and removals left behind; a copy that a person made has another one."""
    return sorted(
        name for name in storage.list() if re.fullmatch(r"step-\d{9,}\.(partial|reports|replaced|deleted)", name)
    )


def name_latest(storage: Storage, step: int) -> None:
    """Say in `latest` which checkpoint is the newest."""
    storage.put(ROOT, LATEST, [f"{checkpoint_name(step)}\n".encode()])


def had_checkpoints(run: Path) -> bool:
    """Whether a checkpoint of this run was ever finished."""
    if saved_steps(run):
        return True
    try:
        storage_of(run).read(ROOT, LATEST).close()
    except OSError:
        return False
    return True


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def newest_complete(
    run: Path,
    topology: "Topology | None" = None,
    report: Callable[[str], None] = _to_stderr,
    state: str | None = None,
) -> Checkpoint | None:
    """The newest checkpoint of a run whose manifest, sizes and hashes are right; None if there is none.

    Each one passed over goes to `report` with its name and the reason. With a topology it is collective: rank 0 chooses
    the candidates, the ranks share the hashing, and all get the same answer. `state`: the only one that is to be read, and so hashed.
    """
    if topology:
        from pretrain.ranks.distributed import all_reduce_sum, any_rank
    storage = storage_of(run)
    rank, world_size = (topology.rank, topology.world_size) if topology else (0, 1)
    if rank == 0:
        for leftover in unfinished(storage):
            report(f"{storage}/{leftover} passed over: the save was not finished")
    steps = saved_steps(run) if rank == 0 else []
    while True:
        # Rank 0's list decides: on a network file system another rank may see other folders for a moment.
        step = float(steps.pop(0)) if steps else -1.0
        if topology:
            step = all_reduce_sum([step if rank == 0 else 0.0])[0]
        if step < 0:
            return None
        checkpoint = Checkpoint(storage, checkpoint_name(int(step)))
        reason = None
        try:
            manifest = read_manifest(checkpoint)
            if manifest.step != step:
                raise UserError(f"{checkpoint} says in its manifest that it is step {manifest.step}")
            check_sizes(manifest)
            check_hashes(manifest, state, rank, world_size)
        except (UserError, OSError) as error:
            reason = str(error)
            report(f"{checkpoint} passed over: {reason}")
        if not (any_rank(reason is not None) if topology else reason):
            return checkpoint


def discard_after(run: Path, step: int, topology: "Topology | None" = None) -> None:
    """Before a rewind to `step`: remove the later checkpoints, a continuation given up. Collective with a topology."""
    if topology is None or topology.is_main:
        storage = storage_of(run)
        for saved in saved_steps(run):
            if saved > step:
                storage.remove(checkpoint_name(saved))
        for newest in saved_steps(run)[:1]:
            name_latest(storage, newest)
    if topology is not None:
        _barrier()


def complete_steps(run: Path) -> dict[int, str]:
    """The fingerprint of every checkpoint of a run whose files are there in their sizes, by step; the hashes are the ranks' to check."""
    found = {}
    for step in saved_steps(run):
        with contextlib.suppress(UserError, OSError):
            manifest = read_manifest(checkpoint_at(run, step))
            check_sizes(manifest)
            found[step] = manifest.fingerprint
    return found


def stated_fingerprint(run: str | Path) -> str | None:
    """What the checkpoint says of itself that `checkpoint_of` would take, by manifests and sizes alone; None if there is none.

    Raises: UserError for a named checkpoint whose manifest cannot be read.
    """
    path = Path(run).absolute()
    if (path / MANIFEST).is_file():
        return read_manifest(Checkpoint(Folder(path.parent), path.name)).fingerprint
    return next(iter(complete_steps(path).values()), None)


def put_aside_after(run: Path, step: int, topology: "Topology") -> None:
    """What is newer than the checkpoint that a run goes on from was passed over: rename it, so that neither the next search nor what
    decides what is kept counts it. Collective.
    """
    if topology.is_main:
        storage = storage_of(run)
        for saved in saved_steps(run):
            if saved > step:
                name, taken = f"{checkpoint_name(saved)}.damaged", storage.list()
                aside = next(new for n in itertools.count(1) if (new := f"{name}-{n}") not in taken)
                storage.commit(checkpoint_name(saved), aside)
        name_latest(storage, step)
    _barrier()


def _barrier() -> None:
    from pretrain.ranks.distributed import barrier

    barrier()


def checkpoint_at(run: Path, step: int) -> Checkpoint:
    """A run's checkpoint of a step, unchecked (`manifest.unaltered` checks). Raises: UserError with the steps that there are."""
    if step not in saved_steps(run):
        there_are = ", ".join(map(str, reversed(saved_steps(run)))) or "none"
        raise UserError(f"{run} has no checkpoint of step {step}; it has {there_are}")
    return Checkpoint(storage_of(run), checkpoint_name(step))


def checkpoint_of(run: str | Path, named_by: str = "", state: str | None = "ema") -> Checkpoint:
    """The newest complete checkpoint of a run folder, or the checkpoint whose folder is named; hashed in either case.

    Args:
        named_by: the option or key that tells where a folder is that has been moved.
        state: the one that is to be read, as in `read_tensors`: the others may be damaged. All of them when None.

    Raises: UserError.
    """
    path = Path(run)
    if (path / MANIFEST).is_file():
        path = path.absolute()  # "." has no name
        return unaltered(Checkpoint(Folder(path.parent), path.name), state).checkpoint
    found = newest_complete(path, state=state) if path.is_dir() else None
    if found is None:
        moved = f"; if it was moved, say where it is now with {named_by}" if named_by else ""
        raise UserError(
            f"{run} is neither a checkpoint (with {MANIFEST}) nor a run with a complete checkpoint in {CHECKPOINTS}/;"
            f" expected the folder of a trained run, e.g. runs/vae_base{moved}"
        )
    return found
