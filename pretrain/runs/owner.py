"""A run folder has one owner at a time: the job whose rank 0 holds <run>/owner.json and writes its heartbeat there.

Whoever comes second says who holds it, and ends. An owner is dead when its process is known to be gone from this machine, or when
its heartbeat stands still for as long as it is watched from here: clocks of hosts differ, and a copied folder brings the file along.
A job whose folder was taken over, because it had stood still for long, finds another owner's name in it and ends.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json
from pretrain.faults.exit_codes import EXIT_FAILED
from pretrain.ranks.launcher import job_name

OWNER = "owner.json"
BEAT_S = 5.0
"""Between an owner's heartbeats."""
DEAD_S = 45.0
"""An owner whose heartbeat stands still for so long is dead."""
SETTLE_S = 1.0
"""Of two jobs that take over the same dead owner's folder, the later one to write has it."""
RECORD_BYTES = 1024
"""Written in place, in one size: a rename would be seen late by other hosts of a network file system, and a full disk holds it."""


@dataclass(frozen=True)
class Owner:
    """Who holds a run folder."""

    token: str
    host: str
    pid: int
    started: int | None
    """When the process began, in the kernel's ticks: process ids are used again."""
    machine: str
    """Where process ids mean the same: the kernel's boot and the container's process namespace."""
    job: str
    """The scheduler's or launcher's name for it."""
    beat: int
    time: float
    """Of the heartbeat, in seconds since 1970 by the owner's clock, for people."""

    @classmethod
    def here(cls) -> Self:
        """This process as an owner."""
        pid, job = os.getpid(), job_name(os.environ)
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _started(pid), _machine(), job, 0, time.time())

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """The owner in a file's text; None in one that is torn, or of another version."""
        with contextlib.suppress(ValueError, TypeError):
            return cls(**parse_json(text))
        return None

    def is_gone(self) -> bool:
        """Whether its process certainly has ended; False also where that cannot be known from here."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's
            pass
        return _started(self.pid) not in (None, self.started)

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class Ownership:
    """This process's hold on a run folder, which is made if need be, until `release`.

    Args:
        say: gets the line that another owner's heartbeat is waited for.
        lost: called with a sentence, from a thread, when the folder has another owner.

    Raises: UserError when another process holds the folder, and when it cannot be written.
    """

    def __init__(
        self, run: Path, say: Callable[[str], object] = print, lost: Callable[[str], object] | None = None
    ) -> None:
        self._path, self._owner, self._lost = run / OWNER, Owner.here(), lost or _end
        self._released = threading.Event()
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not self._create():
                self._take_over(say)
        except OSError as error:
            raise UserError(
                f"the run folder {run} cannot be written ({error.strerror or error}): mend its permissions or make room, or name"
                " another folder with --run"
            ) from error
        self._thread = threading.Thread(target=self._keep, name="owner", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder up; one that has stayed empty goes."""
        self._released.set()
        self._thread.join(BEAT_S)  # on a file system that hangs it may never end
        with contextlib.suppress(OSError):
            if self._is_ours(self._read()):
                self._path.unlink()
                self._path.parent.rmdir()

    def _create(self) -> bool:
        try:
            with self._path.open("xb", buffering=0) as file:  # one of several that come at once makes it, on NFS too
                self._write(file.write)
        except FileExistsError:
            return False
        except OSError:
            self._path.unlink(missing_ok=True)  # an empty one, on a full disk
            raise
        return True

    def _take_over(self, say: Callable[[str], object]) -> None:
        """Watch the owner until it has shown that it is alive, which is refused, or dead."""
        before, deadline, told = self._read(), time.monotonic() + DEAD_S, False
        while time.monotonic() < deadline and not ((owner := Owner.parse(before)) and owner.is_gone()):
            if not told:
                say(
                    f"{self._path.parent} is held by {owner or 'another job'}: waiting for its heartbeat, {DEAD_S:.0f} s at most"
                )
                told = True
            time.sleep(0.1)
            if (now := self._read()) != before:
                if not now and self._create():
                    return  # it has just ended
                self._refuse(now)
        with self._path.open("r+b", buffering=0) as file:
            self._write(file.write)
        time.sleep(SETTLE_S)
        if not self._is_ours(now := self._read()):
            self._refuse(now)

    def _refuse(self, text: str) -> None:
        owner = Owner.parse(text)
        seen = f", last sign of life {time.strftime('%F %T', time.localtime(owner.time))}" if owner else ""
        raise UserError(
            f"{self._path.parent} is in use by {owner or 'another job'}{seen}: wait for its end or stop it, or name another folder"
            " with --run"
        )

    def _keep(self) -> None:
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                if not self._is_ours(text := self._read()) and (other := Owner.parse(text)):
                    self._lost(f"{self._path.parent} now belongs to {other}")
                    return
                self._owner = replace(self._owner, beat=self._owner.beat + 1, time=time.time())
                with self._path.open("r+b", buffering=0) as file:
                    self._write(file.write)

    def _write(self, write: Callable[[bytes], int | None]) -> None:
        write(json.dumps(asdict(self._owner)).encode().ljust(RECORD_BYTES))

    def _read(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._path.read_text(encoding="utf-8")
        return ""

    def _is_ours(self, text: str) -> bool:
        owner = Owner.parse(text)
        return owner is not None and owner.token == self._owner.token


def _end(why: str) -> None:
    from pretrain.faults.exits import leave  # with torch, which who owns a folder for a moment does without

    print(f"{why}: this process, which had stood still, ends", file=sys.stderr, flush=True)
    leave(EXIT_FAILED)


def _machine() -> str:
    """Empty where it is unknown."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process began, in the kernel's ticks since its boot; -1 of one that has ended but is not forgotten, None if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return -1 if state in "ZX" else int(fields[18])
