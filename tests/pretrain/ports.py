"""Ports for the jobs of tests."""

import itertools
import os
import socket

# Below those that the kernel gives away by itself, so that no connection takes one between here and its use, and from a
# beginning of each process's own, so that tests side by side do not.
_FIRST, _LAST = 10_000, 29_000
_BEGINNING = _FIRST + os.getpid() * 97 % (_LAST - _FIRST)
_ports = itertools.cycle([*range(_BEGINNING, _LAST), *range(_FIRST, _BEGINNING)])


def job_port() -> int:
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
