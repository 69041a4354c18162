"""What started this process, has started it before, and will end it. Imports nothing that takes its time."""

import functools
import itertools
import os
import signal
import socket
from collections.abc import Mapping

from data_pipeline.core.launcher import launchers


@functools.cache
def first_launchers() -> tuple[int, int] | None:
    """What `launchers()` gave at the first call. train.py makes it among its first lines: a launcher may end during the imports."""
    return launchers()


def stop_signals() -> list[signal.Signals]:
    """By which a scheduler, or a terminal that hangs up, asks a job to end; not those that this process ignores, under nohup."""
    asked = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    return [number for number in asked if signal.getsignal(number) is not signal.SIG_IGN]


def job_name(environ: Mapping[str, str]) -> str:
    """What the scheduler or launcher calls this job, restarts included, in words; empty where there is none."""
    kinds = {"SLURM_JOB_ID": "Slurm job", "TEXTLDM_JOB": "supervised job", "TORCHELASTIC_RUN_ID": "torchrun job"}
    names = (f"{kind} {environ[name]}" for name, kind in kinds.items() if environ.get(name) not in (None, "", "none"))
    return next(names, "")


def is_restart(environ: Mapping[str, str]) -> bool:
    """Whether Slurm, after a requeue, or torchrun has started this job with the same arguments before."""
    counts = (environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count.isdigit() and int(count) > 0 for count in counts)


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


def on_free_port(command: list[str]) -> list[str]:
    """The command with a free port for `deepspeed`, which by itself takes the same one for all jobs; others as they are."""
    name, *arguments = command
    given = any(argument.partition("=")[0] == "--master_port" for argument in arguments)
    if os.path.basename(name) != "deepspeed" or given:
        return command
    return [name, "--master_port", str(free_port()), *arguments]
