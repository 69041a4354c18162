"""Where a job's processes meet: at rank 0's store, where each says that it has come.

torch's own meeting says nothing for as long as somebody is missing, and hears no signal meanwhile. Here a thread waits, so that the
main one runs signal handlers, and says after `SAY_S` who is awaited.
"""

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from data_pipeline.core.environment import Launch
from data_pipeline.core.errors import UserError, reason
from pretrain.ranks.addresses import is_loopback
from pretrain.ranks.peers import EXIT_LOST

SAY_S = 10.0
"""After so many seconds it is said who is awaited."""
POLL_S = 0.1
BY_HAND = "if this is meant to be one process, unset RANK and WORLD_SIZE (in a Slurm step: SLURM_STEP_ID)"
"""What to do where a shell has left-over variables of a launcher, or is itself one of several tasks."""


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def meet(
    job: Launch, master: str, port: int, timeout_s: float, say: Callable[[str], object] = _to_stderr
) -> dist.Store:
    """Wait until all ranks have come; the store that they share.

    Raises: UserError when the port is taken; SystemExit (EXIT_LOST), with a line that names them, when some have not come in time.
    """
    meeting = _Meeting(job, master, port, timeout_s)
    meeting.start()
    began, told = time.monotonic(), False
    while meeting.is_alive():
        meeting.join(POLL_S)  # between two of these, signal handlers run
        if not told and time.monotonic() > began + SAY_S and (awaited := meeting.awaited()):
            say(f"{awaited}; {BY_HAND}")
            told = True
    if meeting.store is not None:
        return meeting.store
    if getattr(meeting.error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(meeting.error):
        raise UserError(
            f"port {port} of {socket.gethostname()}, MASTER_PORT, is taken by another program or job: give the launcher another one"
            " (deepspeed and torchrun: --master_port)"
        )
    awaited = meeting.awaited() or f"rank {job.rank} has lost rank 0"
    say(f"{awaited}: given up after {timeout_s:.0f} s ({reason(meeting.error or TimeoutError())}); {BY_HAND}")
    raise SystemExit(EXIT_LOST)


class _Meeting(threading.Thread):
    """Connects, says that this rank has come, and waits for the others; then there is a `store`, or else an `error`."""

    def __init__(self, job: Launch, master: str, port: int, timeout_s: float) -> None:
        super().__init__(name="meeting", daemon=True)
        self.store: dist.Store | None = None
        self.error: Exception | None = None
        self._job, self._place, self._timeout_s = job, (master, port), timeout_s
        self._connected = False
        self._missing, self._come = set(range(job.world_size)), dict[int, str]()

    def run(self) -> None:
        """In the thread."""
        try:
            self._meet()
        except Exception as error:  # the main thread says what it was
            self.error = error

    def _meet(self) -> None:
        rank = self._job.rank
        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent serves
        deadline = time.monotonic() + self._timeout_s
        serves = rank == 0 and not agents
        listener = _loopback_listener(*self._place) if serves and is_loopback(self._place[0]) else None
        store = dist.TCPStore(
            *self._place,
            self._job.world_size,
            is_master=serves,
            master_listen_fd=listener,
            wait_for_workers=False,
            multi_tenant=not agents,
            timeout=timedelta(seconds=self._timeout_s),
        )
        shared = dist.PrefixStore(f"textldm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._connected = True
        shared.set(f"come/{rank}", socket.gethostname())
        while rank == 0 and self._missing:
            for other in sorted(self._missing):
                if shared.check([f"come/{other}"]):
                    self._come[other] = shared.get(f"come/{other}").decode()
                    self._missing = self._missing - {other}
            if self._missing and time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(POLL_S / 10)
        if rank == 0:
            shared.set("all have come", "")
        else:
            shared.wait(["all have come"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
        self.store = shared

    def awaited(self) -> str:
        """Who is missing, in words; empty on other ranks that have reached rank 0, which says it for all."""
        job, place = self._job, "{}:{}".format(*self._place)
        if job.rank or not self._connected:
            return "" if self._connected else f"rank {job.rank} of {job.world_size} waits for rank 0 at {place}"
        come = ", ".join(f"{rank} on {host}" for rank, host in sorted(self._come.items()))
        return f"rank 0 waits at {place} for rank(s) {_ranges(self._missing)} of {job.world_size}; there are {come}"


def _loopback_listener(host: str, port: int) -> int:
    """The descriptor of a socket that only this host reaches: by itself a store listens on all of the host's addresses. Raises: OSError."""
    listener = socket.create_server(
        (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
    )
    return listener.detach()  # the store's from here on


def _ranges(numbers: set[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
