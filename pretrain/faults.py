"""What a run does when something goes wrong: signals, hangs, bad gradients, exceptions, memory.

A process ends with one of the codes of `EXIT_CODES`, promptly: a rank that lingers leaves the others waiting in a
collective operation. What all ranks must decide alike is decided from numbers that all of them have.
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import UserError
from pretrain.distributed import await_cause, barrier, goodbye
from pretrain.launcher import first_launchers, launchers
from pretrain.peers import EXIT_LOST

EXIT_OK, EXIT_FAILED, EXIT_USER, EXIT_REQUEUE, EXIT_HUNG, EXIT_SKIPS = 0, 1, 2, 85, 86, 87
EXIT_CODES = {
    EXIT_OK: "finished",
    EXIT_FAILED: "an error on some rank; its traceback says which",
    EXIT_USER: "a mistake in the input, named in one line",
    EXIT_REQUEUE: "SIGTERM or SIGUSR1: a checkpoint is written; start the same command again to go on",
    EXIT_HUNG: "no progress for train.watchdog_s; stacks are in the run folder; restarting resumes",
    EXIT_SKIPS: "too many steps with bad gradients; a restart would meet them again (skipped.jsonl)",
    EXIT_LOST: "another rank was killed or its host is out of reach, and is named; restarting resumes",
}

HEARTBEAT_S = 5.0
"""Longest pause between a rank's heartbeats."""
END_TIMEOUT_S = 20.0
"""How long a hung process may take to say so."""
HEARTBEAT_AGE_S = 120.0
"""By how much a rank of the same job may have started earlier, clocks that differ included."""


class TooManySkips(RuntimeError):
    """More steps than train.max_skips within train.skip_window had bad gradients."""


class Signals:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they take the machine, instead of dying of them.

    The end of deepspeed's launcher counts as one: a signal to it alone ends it, but not its ranks, which would train on
    beside those of the next start.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._launchers = first_launchers()
        self.on_first: Callable[[], None] = lambda: None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> str | None:
        """This rank's; the loop sums it over all ranks with its token counts, so that all stop at one step."""
        if self._received is None and self._launchers is not None and self._launchers != launchers():
            self._stop("the launcher's end")
        return self._received

    def _note(self, number: int, _: object) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        if self._received is None:
            self._received = reason
            self.on_first()


class Watchdog:
    """A thread that ends the process when the loop makes no progress, naming the rank that holds up the others.

    Every rank's thread writes a heartbeat file (step, phase, how long it is in it). A frozen or dead process stops
    writing, a waiting one writes that it waits, so that the ranks that are alive can name the one that is not.
    A thread of its own writes it, so that a run folder that hangs keeps nobody from looking at the time.
    """

    PHASES = ("setup", "data", "count", "compute", "measure", "update", "log", "checkpoint", "evaluate", "end")

    def __init__(self, timeout_s: float, run: Path, rank: int, host: str = "", exit_process: Callable = os._exit):
        self._timeout_s, self._run, self._rank, self._host = timeout_s, run, rank, host
        self._exit_process = exit_process
        self._position = (0, "setup", time.monotonic())
        self._deadline: float | None = None
        self._silent, self._stopped = threading.Event(), threading.Event()
        self._folder = run / "heartbeats"
        self._since = time.time()
        self._poll_s = min(HEARTBEAT_S, timeout_s / 4)
        self._heart = threading.Thread(target=self._write_heartbeats, name="heartbeat", daemon=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write_heartbeat()  # so that a rank that freezes before the first poll can be named too
        self._heart.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._silent.set()
        self._heart.join()  # still watched
        with contextlib.suppress(OSError):
            self._file(self._rank).unlink(missing_ok=True)
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
        while not self._silent.wait(self._poll_s):
            self._write_heartbeat()

    def _write_heartbeat(self) -> None:
        step, phase, since = self._position
        beat = {"rank": self._rank, "host": self._host, "pid": os.getpid(), "step": step, "phase": phase}
        beat |= {"stuck_s": round(time.monotonic() - since, 1), "time": time.time()}
        temporary = self._file(self._rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(beat), encoding="utf-8")
            temporary.replace(self._file(self._rank))
        except OSError:  # a full or absent disk must not end the run from here
            return

    def culprit(self) -> str:
        """A sentence naming the rank that is silent, else the one that is furthest behind."""
        beats = []
        for file in sorted(self._folder.glob("rank-*.json")):
            try:
                beats.append(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                continue
        # A killed job leaves its files behind, and may have had more ranks than this one.
        beats = [beat for beat in beats if beat["time"] > self._since - HEARTBEAT_AGE_S]
        if not beats:
            return "no rank's heartbeat is readable"

        def name(beat: dict) -> str:
            return f"rank {beat['rank']} on {beat['host']} (step {beat['step']}, phase {beat['phase']})"

        oldest = min(beats, key=lambda beat: beat["time"])
        silent_s = max(beat["time"] for beat in beats) - oldest["time"]
        if silent_s > 3 * self._poll_s:
            return f"{name(oldest)} is silent for {silent_s:.0f} s: frozen, dead or cut off"
        slowest = min(beats, key=lambda beat: (beat["step"], self.PHASES.index(beat["phase"])))
        return f"{name(slowest)} is the furthest behind"

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

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


class SpikeGuard:
    """Decides which steps are skipped, from numbers that are the same on every rank, and stops when there are too many.

    A step is skipped when its loss or gradient norm is not finite, or (sigmas > 0) when its norm exceeds the median of
    the last `window` accepted norms by more than `sigmas` robust standard deviations (1.4826 x median absolute
    deviation, at least 1 % of the median). The state belongs into checkpoints: a resumed run must
    decide as the uninterrupted one.
    """

    MIN_HISTORY = 16

    def __init__(self, sigmas: float, window: int, max_skips: int, skip_window: int):
        self._sigmas, self._max_skips, self._skip_window = sigmas, max_skips, skip_window
        self._norms: deque[float] = deque(maxlen=window)
        self._skipped_steps: list[int] = []

    def verdict(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the step must be skipped, or None."""
        reason = self._reason(loss, grad_norm)
        if reason is None:
            self._norms.append(grad_norm)
        else:
            self._skipped_steps = [s for s in self._skipped_steps if s > step - self._skip_window] + [step]
        return reason

    def enforce(self, step: int) -> None:
        """Raise TooManySkips if the bound is exceeded, after the rows of the last one are written down."""
        if len(self._skipped_steps) > self._max_skips:
            steps = ", ".join(map(str, self._skipped_steps))
            raise TooManySkips(
                f"step {step}: {len(self._skipped_steps)} steps ({steps}) were skipped within {self._skip_window}, more"
                f" than train.max_skips {self._max_skips}. skipped.jsonl says why and names their rows; lower"
                " optimizer.lr, or set train.rewind=true to go back and leave those rows out"
            )

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self._sigmas and len(self._norms) >= min(self.MIN_HISTORY, self._norms.maxlen or 1):
            median = statistics.median(self._norms)
            deviation = 1.4826 * statistics.median(abs(norm - median) for norm in self._norms)
            sigma = max(deviation, 0.01 * median)
            if grad_norm > median + self._sigmas * sigma:
                return (
                    f"the gradient norm is {grad_norm:.4g}, {(grad_norm - median) / sigma:.0f} sigmas over {median:.4g}"
                )
        return None

    def state(self) -> dict[str, list]:
        """What a checkpoint must carry."""
        return {"norms": list(self._norms), "skipped_steps": self._skipped_steps}

    def load(self, state: dict[str, list]) -> None:
        """The inverse of `state`."""
        self._norms.clear()
        self._norms.extend(state["norms"])
        self._skipped_steps = list(state["skipped_steps"])


def record_skip(run: Path, rank: int, world_size: int, entry: dict[str, Any], batches: Iterable[Any]) -> None:
    """Append this rank's rows of a skipped step to skipped.jsonl, one rank after the other. Collective.

    A line names every row (ticket, split, shard, row, epoch) and each window's uniform numbers; the first gives t.
    """
    rows = [[r.ticket, r.split, r.shard, r.row, r.epoch] for batch in batches for r in batch.rows]
    uniforms = [batch.window_uniforms_W2.tolist() for batch in batches]
    line = json.dumps({**entry, "rank": rank, "time": time.time(), "rows": rows, "window_uniforms": uniforms})
    for writer in range(world_size):
        if writer == rank:
            with open(run / "skipped.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")
        barrier()


def exit_code_of(error: BaseException, rank: int = 0) -> int:
    """Print what went wrong on this rank, as one line for users' mistakes and with a traceback else; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        print(f"rank {rank}: interrupted", file=sys.stderr, flush=True)
        return 130
    if isinstance(error, TooManySkips):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_SKIPS
    if isinstance(error, UserError):
        if rank:  # most likely rank 0 says the same, and the launcher ends this process before it repeats it
            time.sleep(3)
        prefix = f"rank {rank}: " if rank else ""
        print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
        return EXIT_USER
    if is_communication_error(error):
        await_cause()
    lines = "".join(traceback.format_exception(error)).rstrip()
    print(f"rank {rank}:\n{lines}", file=sys.stderr, flush=True)
    if is_out_of_memory(error):
        print(f"rank {rank}: {out_of_memory_advice()}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def is_communication_error(error: BaseException) -> bool:
    """True for a collective operation that failed: mostly the consequence of something on another rank."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return gloo or isinstance(error, torch.distributed.DistError)


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's or the host's failed allocation."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def out_of_memory_advice() -> str:
    """What was resident, and what to lower, cheapest first."""
    gib = 2**30
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        resident = (
            f"{torch.cuda.memory_allocated() / gib:.1f} GiB in tensors, {torch.cuda.memory_reserved() / gib:.1f} GiB"
            f" reserved, peak {torch.cuda.max_memory_allocated() / gib:.1f} GiB;"
            f" the device has {total / gib:.1f} GiB, {free / gib:.1f} free"
        )
    else:
        resident = "host memory is used up"
    return (
        f"out of memory: {resident}. Lower data.micro_batch_rows (gradients stay the same); then"
        " train.activation_checkpointing=1, a higher train.zero_stage, train.offload_optimizer=cpu or nvme"
    )


def leave(code: int) -> None:
    """End the process now, and the job's others with it: no destructor, thread or process group holds it up."""
    goodbye(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
