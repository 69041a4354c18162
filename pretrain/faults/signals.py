"""Signals by which a scheduler or a terminal asks a job to end: noted here, agreed on by all ranks in the loop."""

import signal
from collections.abc import Callable
from typing import Any

from pretrain.ranks.launcher import first_launchers, launchers, stop_signals


class Signals:
    """Notes SIGTERM and SIGUSR1, which schedulers send before they take the machine, and SIGHUP, instead of dying of them.

    The end of deepspeed's launcher counts as one: a signal to it alone ends it, but not its ranks, which would train on
    beside those of the next start.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._launchers = first_launchers()
        self.on_first: Callable[[], None] = lambda: None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._note)
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

    def _note(self, number: int, _: object) -> None:
        self._stop(signal.Signals(number).name)

    def _stop(self, reason: str) -> None:
        if self._received is None:
            self._received = reason
            self.on_first()
