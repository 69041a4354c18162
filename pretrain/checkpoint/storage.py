"""Where a run's checkpoints lie. Five calls are all that is asked of a place: `put`, `read`, `commit`, `list`, `remove`.

A checkpoint is a name and files under it. It is written under a name of its own and gets its final one by `commit`, as
a whole: whoever finds the final name finds all files. What a kill leaves has another name.

Ours is a folder, by default <run>/checkpoints. Others join by name in the group textldm.checkpoint_storages
(docs/extending.md); a run is told of one by a *file* <run>/checkpoints that holds "name:place", so that whoever knows the
run's folder finds its checkpoints.
"""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from data_pipeline.core import plugins
from data_pipeline.core.errors import UserError, reason
from data_pipeline.core.outside import read_at_most
from data_pipeline.core.storage import atomic_write, open_file, sync_folder

OWN = {"folder": "pretrain.checkpoint.storage:Folder"}
"""Our storages by name; called with the place, a string."""

CHECKPOINTS = "checkpoints"
"""In a run's folder: the folder of its checkpoints, or a file that names another place."""

ROOT = ""
"""As a checkpoint's name: the storage itself, for a file beside the checkpoints."""

_LONGEST_PLACE = 4096

Content = Iterable[bytes | memoryview]
"""A file's content in pieces, each to be written before the next one is asked for."""


class Storage(Protocol):
    """A place for checkpoints, shared by all ranks. `str()` of it is its place in messages."""

    def put(self, checkpoint: str, file: str, content: Content) -> None:
        """Write or replace a file, as a whole and for good: readers see all of it or nothing. Raises: OSError."""

    def read(self, checkpoint: str, file: str) -> BinaryIO:
        """The file, to seek and read in. Raises: FileNotFoundError; OSError."""

    def commit(self, unfinished: str, name: str) -> None:
        """Rename a checkpoint in one step, in place of an older one of that name. Raises: OSError."""

    def list(self) -> list[str]:
        """Names of all checkpoints, in any order."""

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint; what is half removed must not be listed under its name."""


class Folder:
    """A folder of folders, on a local disk or a file system that all ranks share."""

    def __init__(self, place: str | Path) -> None:
        self.path = Path(place)

    def __str__(self) -> str:
        return str(self.path)

    def put(self, checkpoint: str, file: str, content: Content) -> None:
        """Write the file beside its place, sync it to the disk and rename it."""
        with atomic_write(self.path / checkpoint / file) as opened:
            for piece in content:
                opened.write(piece)

    def read(self, checkpoint: str, file: str) -> BinaryIO:
        """The open file; a pipe or device is none."""
        return open_file(self.path / checkpoint / file, buffering=0)

    def commit(self, unfinished: str, name: str) -> None:
        """Two renames if there is an older one of that name; between them neither is listed under it."""
        final, replaced = self.path / name, self.path / f"{name}.replaced"
        if final.exists():
            final.rename(replaced)
        (self.path / unfinished).rename(final)
        sync_folder(self.path)
        shutil.rmtree(replaced, ignore_errors=True)

    def list(self) -> list[str]:
        """The folders in it."""
        return [path.name for path in self.path.iterdir() if path.is_dir()] if self.path.is_dir() else []

    def remove(self, checkpoint: str) -> None:
        """Rename the folder to a name that is not listed, then delete it, so that a kill leaves nothing that looks whole."""
        # A name that the next start clears away. What an earlier kill left under it goes first: no folder can be renamed to
        # one that holds something.
        doomed = self.path / f"{checkpoint.partition('.')[0]}.deleted"
        shutil.rmtree(doomed, ignore_errors=True)
        with suppress(FileNotFoundError):
            (self.path / checkpoint).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint by its place and name."""

    storage: Storage
    name: str

    def read(self, file: str) -> BinaryIO:
        """Open one of the checkpoint's files. Raises: FileNotFoundError; OSError."""
        return self.storage.read(self.name, file)

    def __str__(self) -> str:
        return f"{self.storage}/{self.name}"


def storage_of(run: str | Path) -> Storage:
    """Where the checkpoints of this run lie. Raises: UserError for a file that names no known storage."""
    path = Path(run) / CHECKPOINTS
    if not path.is_file():
        return Folder(path)
    try:
        with open_file(path) as file:
            text = read_at_most(file, _LONGEST_PLACE).decode().strip()
    except ValueError as error:
        raise UserError(f"{path} names no place ({error}); expected name:place, or a folder of checkpoints") from None
    name, colon, place = text.partition(":")
    if not colon:
        known = ", ".join(plugins.names("checkpoint_storages", OWN))
        raise UserError(f"{path} holds {name[:80]!r}; expected name:place, the name one of {known}")
    made = plugins.load("checkpoint_storages", name, OWN)
    try:
        return made(place)
    except Exception as error:  # another package's code runs here
        raise UserError(f"{path} names {text}, which cannot be opened: {reason(error)}; correct the place") from error
