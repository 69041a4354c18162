"""The learning rate as a function of the step: nothing to save, nothing that a resumed run could get wrong."""

import math
from typing import Literal

from pydantic import NonNegativeInt

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import Section, Share


class Schedule(Section):
    """Learning rate over the run: linear warm-up, then a shape."""

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    """wsd: constant, then linear decay at the end (warm-up, stable, decay)."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    min_ratio: Share = 0.0
    """Last learning rate over the peak."""
    decay_steps: NonNegativeInt = 0
    """Steps of the decay; 0: all after the warm-up (cosine), the last tenth (wsd)."""

    @property
    def can_be_prolonged(self) -> bool:
        """Whether the rates of the steps so far stay what they were when a run is given more steps.

        A cosine's every step depends on where it ends; a constant rate does not, and wsd is made to be prolonged.
        """
        return self.kind != "cosine"

    def check_fits(self, total_steps: int) -> None:
        """Raise UserError when warm-up and decay take more steps than there are."""
        decay = self.decay_steps if self.kind != "constant" else 0
        if self.warmup_steps + decay > total_steps:
            both = {"warmup_steps": self.warmup_steps, "decay_steps": decay}
            shares = {name: steps * total_steps // (2 * sum(both.values())) for name, steps in both.items() if steps}
            remedy = " ".join(f"--set schedule.{name}={steps}" for name, steps in shares.items())
            raise UserError(
                f"schedule.warmup_steps {self.warmup_steps} and schedule.decay_steps {decay} are more than train.steps"
                f" {total_steps}; train longer, or shorten them to half of it: {remedy}"
            )


def learning_rate(step: int, peak: float, schedule: Schedule, total_steps: int) -> float:
    """Learning rate of update number `step`, counted from 0.

    Warm-up rises as (step + 1) / warmup_steps, so that no update is wasted at rate 0. `decay_steps` is the length of
    the decay: for cosine 0 means all steps after the warm-up, for wsd 0 means the last tenth of `total_steps`. After
    the decay the rate stays at `min_ratio * peak`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        start = schedule.warmup_steps
        length = schedule.decay_steps or total_steps - start
    else:
        length = schedule.decay_steps or max(1, total_steps // 10)
        start = max(schedule.warmup_steps, total_steps - length)
    progress = min(1.0, max(0.0, (step - start) / max(1, length)))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * remaining)
