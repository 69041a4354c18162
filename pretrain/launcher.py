"""deepspeed's launcher: whether it is still there, and a port for it. Imports nothing that takes its time."""

import contextlib
import functools
import os
import socket

import psutil


def launchers() -> tuple[int, int] | None:
    """Process ids of deepspeed's launcher on this host and of what started that; None where there is none."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(os.getppid())
        if "deepspeed.launcher.launch" in parent.cmdline():
            return parent.pid, parent.ppid()
    return None


@functools.cache
def first_launchers() -> tuple[int, int] | None:
    """`launchers()` as they were at the first call, which is among train.py's first lines: a launcher may end during the rest."""
    return launchers()


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
