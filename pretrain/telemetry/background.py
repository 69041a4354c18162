"""What may hang (a network, a terminal that is paused) is written by a thread of its own, for which nobody waits."""

import queue
import threading
from collections.abc import Callable
from typing import Any

BACKLOG = 10_000
"""Calls that wait for a thread at most; what is more is left out."""


class Background:
    """Calls `write` in a thread, one call after the other; what fails is said once, and what hangs holds up nobody.

    Args:
        start: called in the thread; gives `write` and `close`.
        say: gets a line when something is left out.
    """

    def __init__(self, name: str, start: Callable[[], tuple[Callable, Callable]], say: Callable[[str], object]) -> None:
        self._name, self._start, self._say = name, start, say
        self._calls: queue.Queue[tuple] = queue.Queue(BACKLOG)
        self._behind = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, *arguments: Any) -> None:
        """Have `write(*arguments)` called, in time."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait(arguments)
            self._behind = False
        except queue.Full:
            if not self._behind:
                self._say(f"{self._name} does not keep up: what comes now is left out")
            self._behind = True

    def close(self, timeout_s: float) -> None:
        """Have all of it written and closed; after `timeout_s` it is left to itself."""
        self(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say(f"{self._name} hangs, and is left to itself: not all may have been written there")

    def _run(self) -> None:
        what = "is left out"
        try:
            write, close = self._start()
            what = "is left out from here"
            while (arguments := self._calls.get()) != (None,):
                write(*arguments)
            what = "did not close"
            close()
        except Exception as error:  # whatever it is, the run matters more
            self._say(f"{self._name} {what}: {type(error).__name__}: {error}")
