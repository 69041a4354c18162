"""deepspeed's launcher: whether it is still there, and a port for it. Imports nothing that takes its time."""

import contextlib
import functools
import itertools
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
    """What `launchers()` gave at the first call. train.py makes it among its first lines: a launcher may end during the imports."""
    return launchers()


# Below those that the kernel gives away by itself, so that no connection takes one between here and its use, and from a
# beginning of each process's own, so that jobs begun side by side do not.
_FIRST, _LAST = 10_000, 29_000
_BEGINNING = _FIRST + os.getpid() * 97 % (_LAST - _FIRST)
_ports = itertools.cycle([*range(_BEGINNING, _LAST), *range(_FIRST, _BEGINNING)])


def free_port() -> int:
    """A TCP port on which nobody listens, another one at every call."""
    for port in _ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise AssertionError("cycle() ends")
