"""Signals by which a scheduler or a terminal asks a job to end: noted here, agreed on by all ranks in the loop."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.core.launcher import launchers
from pretrain.ranks.launcher import first_launchers, stop_signals

INTERRUPT = signal.SIGINT.name
SAME_PRESS_S = 1.0
"""Launchers send their ranks the Ctrl-C that the terminal has sent these already; a second press takes people longer."""


@contextmanager
def ends_at_once() -> Iterator[None]:
    """While nothing can be saved, Ctrl-C ends the process as the kernel does it: also one that waits in a library, without a traceback."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # ignored, as of jobs in the background, or another program's business
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Signals:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they take the machine, SIGHUP and SIGINT, instead of dying of them.

    SIGINT, Ctrl-C, saves and ends only while `at_work`; before, it is a KeyboardInterrupt. At a second one the process ends at once.

    The end of deepspeed's launcher counts as one: a signal to it alone ends it, but not its ranks, which would train on
    beside those of the next start.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._launchers = first_launchers()
        self.on_first: Callable[[], None] = lambda: None
        self.on_second: Callable[[], None] = lambda: None
        self.at_work = False
        self._interrupted_at: float | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of jobs in the background
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def received(self) -> str | None:
        """What asks this rank to stop, such as SIGTERM, or None. The loop sums over all ranks whether there is something, together
        with the token counts, so that all stop at the same step.
        """
        if self._received is None and self._launchers is not None and self._launchers != launchers():
            self._stop("the launcher's end")
        return self._received

    def _interrupt(self, number: int, frame: object) -> None:
        if not self.at_work:
            raise KeyboardInterrupt
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            self._note(number, frame)
        elif now - self._interrupted_at > SAME_PRESS_S:
            self.on_second()

    def _note(self, number: int, _: object) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        if self._received is None:
            self._received = reason
            self.on_first()
