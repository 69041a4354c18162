"""deepspeed's launcher above this process: is it there, and did it find its hostfile? Imports nothing that takes its time."""

import contextlib
import itertools
import os

import psutil

from data_pipeline.core.errors import UserError


def launchers() -> tuple[int, int] | None:
    """Process ids of deepspeed's launcher on this host and of what started that; None where there is none."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in parent.cmdline():
            return parent.pid, parent.ppid()
    return None


def check_hostfile() -> None:
    """Refuse a hostfile that `deepspeed` was given and did not find, whereupon it goes on with this machine alone. Raises: UserError."""
    missing = None
    with contextlib.suppress(psutil.Error, AttributeError):  # no parent's parent
        runner = psutil.Process(os.getppid()).parent()
        missing = _named_but_missing(runner.cmdline(), runner.cwd()) if launchers() else None
    if missing:
        raise UserError(
            f"there is no hostfile {missing}, without which deepspeed would use this machine alone; expected lines like those of"
            " configs/cluster/hosts.example; for one machine leave --hostfile out"
        )


def _named_but_missing(words: list[str], folder: str) -> str | None:
    for word, following in itertools.pairwise([*words, ""]):
        option, equals, value = word.partition("=")
        if option in ("-H", "--hostfile"):
            path = value if equals else following
            return None if os.path.isfile(os.path.join(folder, path)) else path
    return None
