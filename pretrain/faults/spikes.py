"""Bad gradients: which steps are skipped, what is written down of them, and when there are too many.

What all ranks must decide alike is decided from numbers that all of them have.
"""

import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from pretrain.faults.output import LineFile
from pretrain.ranks.distributed import barrier


class TooManySkips(RuntimeError):
    """More steps than train.max_skips within train.skip_window had bad gradients."""


class GuardState(BaseModel):
    """What a checkpoint must carry of a `SpikeGuard`."""

    norms: list[float] = []
    """Of the last accepted steps."""
    skipped_steps: list[int] = []
    """Numbers of the steps skipped lately."""
    rejected: list[float] = []
    """Norms of the steps that were skipped one after the other just now, for their size alone."""


class SpikeGuard:
    """Decides which steps are skipped, from numbers that are the same on every rank, and stops when there are too many.

    A step is skipped when its loss or gradient norm is not finite, or (sigmas > 0) when its norm exceeds the median of
    the last `WINDOW` accepted norms by more than `sigmas` robust standard deviations (1.4826 x median absolute
    deviation, at least 1 % of the median). A raised norm that lasts is no spike but a new level: after `LEVEL_AFTER` of them in a
    row, or max_skips where that is less, near one another and no more than `LEVEL_FACTOR` times the old median, the next are
    measured by them. The state belongs into checkpoints: a resumed run must
    decide as the uninterrupted one.
    """

    MIN_HISTORY, WINDOW = 16, 128
    LEVEL_AFTER, LEVEL_SPREAD, LEVEL_FACTOR = 4, 1.5, 4.0

    def __init__(self, sigmas: float, max_skips: int, skip_window: int):
        self._sigmas, self._max_skips, self._skip_window = sigmas, max_skips, skip_window
        self._norms: deque[float] = deque(maxlen=self.WINDOW)
        self._skipped_steps: list[int] = []
        self._rejected: list[float] = []

    def verdict(self, step: int, loss: float, grad_norm: float) -> str | None:
        """Why the step must be skipped, or None."""
        reason = self._reason(loss, grad_norm)
        if reason is None or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._rejected = []
        elif self._is_new_level(grad_norm):
            self._norms.clear()
            self._norms.extend([*self._rejected, grad_norm])
            self._rejected = []
            return None
        else:
            self._rejected.append(grad_norm)
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

    def _is_new_level(self, grad_norm: float) -> bool:
        """Whether the norms rejected in a row, this one behind them, are a level of their own."""
        level = [*self._rejected, grad_norm]
        if len(self._rejected) < max(1, min(self.LEVEL_AFTER, self._max_skips)):
            return False
        near = max(level) <= self.LEVEL_SPREAD * min(level)
        return near and max(level) <= self.LEVEL_FACTOR * statistics.median(self._norms)

    def _reason(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        if self._sigmas and len(self._norms) >= self.MIN_HISTORY:
            median = statistics.median(self._norms)
            deviation = 1.4826 * statistics.median(abs(norm - median) for norm in self._norms)
            sigma = max(deviation, 0.01 * median)
            if grad_norm > median + self._sigmas * sigma:
                return (
                    f"the gradient norm is {grad_norm:.4g}, {(grad_norm - median) / sigma:.0f} sigmas over {median:.4g}"
                )
        return None

    def state(self) -> GuardState:
        """What a checkpoint must carry."""
        return GuardState(
            norms=list(self._norms), skipped_steps=list(self._skipped_steps), rejected=list(self._rejected)
        )

    def load(self, state: GuardState) -> None:
        """The inverse of `state`."""
        self._norms.clear()
        self._norms.extend(state.norms)
        self._skipped_steps = list(state.skipped_steps)
        self._rejected = list(state.rejected)


def record_skip(run: Path, rank: int, world_size: int, entry: dict[str, Any], batches: Iterable[Any]) -> None:
    """Append this rank's rows of a skipped step to skipped.jsonl, one rank after the other. Collective.

    A line names every row (ticket, split, shard, row, epoch) and each window's uniform numbers; the first gives t.
    """
    rows = [[r.ticket, r.split, r.shard, r.row, r.epoch] for batch in batches for r in batch.rows]
    uniforms = [batch.window_uniforms_W2.tolist() for batch in batches]
    line = json.dumps({**entry, "rank": rank, "time": time.time(), "rows": rows, "window_uniforms": uniforms})
    for writer in range(world_size):
        if writer == rank:
            file = LineFile(run / "skipped.jsonl")
            file.write(line)
            file.close()
        barrier()
