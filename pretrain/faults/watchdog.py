"""Hangs: a process that makes no progress ends, with its stacks written down and the rank named that holds up the others."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pretrain.faults.exit_codes import EXIT_HUNG, EXIT_REQUEUE
from pretrain.faults.heartbeat import FOLDER, Heartbeat, heartbeat_file, read_heartbeats
from pretrain.ranks.distributed import goodbye

HEARTBEAT_S = 5.0
"""Pause between a rank's heartbeats, and between two looks at the time."""
HEARTBEATS_A_SECOND = 8.0
"""Of all ranks together, at most: they write to a disk that they share."""
END_TIMEOUT_S = 20.0
"""How long a hung process may take to say so."""
HEARTBEAT_AGE_S = 120.0
"""By how much a rank of the same job may have started earlier, clocks that differ included."""


class Watchdog:
    """A thread that ends the process when the loop makes no progress, naming the rank that holds up the others.

    Every rank's thread writes a heartbeat file (step, phase, how long it is in it). A frozen or dead process stops
    writing, a waiting one writes that it waits, so that the ranks that are alive can name the one that is not.
    A thread of its own writes it, so that a run folder that hangs keeps nobody from looking at the time.
    """

    PHASES = ("setup", "data", "count", "compute", "measure", "update", "log", "checkpoint", "evaluate", "end")

    def __init__(
        self,
        timeout_s: float,
        run: Path,
        rank: int,
        host: str = "",
        exit_process: Callable = os._exit,
        world_size: int = 1,
    ):
        self._timeout_s, self._run, self._rank, self._host = timeout_s, run, rank, host
        self._exit_process = exit_process
        self._position = (0, "setup", time.monotonic())
        self._deadline: float | None = None
        self._silent, self._stopped = threading.Event(), threading.Event()
        self._since = time.time()
        self._poll_s = min(HEARTBEAT_S, timeout_s / 4)
        self._heartbeat_s = min(max(HEARTBEAT_S, world_size / HEARTBEATS_A_SECOND), timeout_s / 4)
        self._heart = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        (self._run / FOLDER).mkdir(parents=True, exist_ok=True)
        self._write_heartbeat()  # so that a rank that freezes before the first poll can be named too
        self._heart.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._silent.set()
        self._heart.join()  # still watched
        with contextlib.suppress(OSError):
            heartbeat_file(self._run, self._rank).unlink(missing_ok=True)
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, step: int, phase: str) -> None:
        """The loop is at this phase of this step: progress."""
        self._position = (step, phase, time.monotonic())

    def end_within(self, seconds: float) -> None:
        """After a signal: the process must end within so many seconds, or it is ended, for requeue all the same."""
        self._deadline = self._deadline or time.monotonic() + seconds

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            # A thread of C, which also runs when this one cannot because somebody keeps the interpreter lock for ever.
            faulthandler.dump_traceback_later(self._timeout_s + 4 * self._poll_s, exit=True)
            step, phase, since = self._position
            stuck_s = time.monotonic() - since
            if stuck_s > self._timeout_s:
                self._end(EXIT_HUNG, f"no progress for {stuck_s:.0f} s, in phase {phase} of step {step}")
            if self._deadline and time.monotonic() > self._deadline:
                self._end(EXIT_REQUEUE, "the checkpoint did not finish within train.grace_s; the one before it stands")

    def _write_heartbeats(self) -> None:
        while not self._silent.wait(self._heartbeat_s):
            self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        step, phase, since = self._position
        stuck_s = round(time.monotonic() - since, 1)
        beat = Heartbeat(self._rank, self._host, os.getpid(), step, phase, stuck_s, time.time())
        with contextlib.suppress(OSError):  # a full or absent disk must not end the run from here
            beat.write(self._run)

    def culprit(self) -> str:
        """A sentence naming the rank that is silent, else the one that is furthest behind."""
        # A killed job leaves its files behind, and may have had more ranks than this one.
        beats = [beat for beat in read_heartbeats(self._run) if beat.time > self._since - HEARTBEAT_AGE_S]
        if not beats:
            return "no rank's heartbeat is readable"

        def name(beat: Heartbeat) -> str:
            return f"rank {beat.rank} on {beat.host} (step {beat.step}, phase {beat.phase})"

        oldest = min(beats, key=lambda beat: beat.time)
        silent_s = max(beat.time for beat in beats) - oldest.time
        if silent_s > 3 * self._heartbeat_s:
            return f"{name(oldest)} is silent for {silent_s:.0f} s: frozen, dead or cut off"
        slowest = min(beats, key=lambda beat: (beat.step, self.PHASES.index(beat.phase)))
        return f"{name(slowest)} is the furthest behind"

    def _end(self, code: int, why: str) -> None:
        # The run folder may hang, and nobody may read what is printed; the process ends all the same.
        forced = threading.Timer(END_TIMEOUT_S, self._leave, [code])
        forced.daemon = True
        forced.start()
        print(f"rank {self._rank}: {why}; exit code {code}", file=sys.stderr, flush=True)
        if code == EXIT_HUNG:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            whole = f"{why}; {self.culprit()}"
            print(f"rank {self._rank}: {whole}", file=sys.stderr, flush=True)
            try:
                with open(self._run / f"stacks-rank-{self._rank:05d}.txt", "w", encoding="utf-8") as file:
                    file.write(f"{whole}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError as error:
                print(f"rank {self._rank}: the stacks are only here: {error}", file=sys.stderr, flush=True)
        self._leave(code)

    def _leave(self, code: int) -> None:
        goodbye(code, linger_s=3 * self._poll_s if code == EXIT_HUNG else 0.0)  # the others write their stacks too
        self._exit_process(code)
