"""What `textldm diagnose` knows of a stage, and what every stage's diagnosis measures with."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.reading.batch import Batch
from pretrain.config.schema import RunConfig
from pretrain.diagnose.page import Panel
from pretrain.diagnose.verdicts import Figures, Verdict
from pretrain.stages.rows import heldout_rows, training_batches


@dataclass(frozen=True)
class Diagnosis:
    """How the runs of a stage are diagnosed; `StageKind.diagnosis` names the place of one.

    Attributes:
        measure: called with (stage with the EMA weights, device), gives named figures, as JSON has them. `samples`, where there are any, is
            a list of {"context", "generated"} texts; `run`, `stage`, `step`, `seconds`, `verdict` and `checks` are the command's own.
        judge: called with (figures, configuration), gives the lines of the table. If none of them has passed or failed, the run is neither
            go nor no-go.
        panels: called with (figures), gives what the page draws: functions of (axes, figures).
    """

    measure: Callable[[Any, torch.device], Figures]
    judge: Callable[[Figures, Any], list[Verdict]]
    panels: Callable[[Figures], Sequence[Panel]] = lambda _: ()


def heldout(config: RunConfig, device: torch.device) -> list[Batch]:
    """The run's first held-out rows, with its features."""
    rows = config.diagnose.rows
    batches = heldout_rows(config, rows, micro_batch_rows=min(config.data.micro_batch_rows, rows))
    return [batch.to(device) for batch in batches]


def training(config: RunConfig, device: torch.device, rows: int) -> list[Batch]:
    """The first training rows, cut as held-out ones are, for comparison."""
    batch_rows = config.data.micro_batch(at_most=rows)
    batches = training_batches(config, rows, batch_rows, config.data.split)[: rows // batch_rows]
    return [batch.to(device) for batch in batches]


@contextmanager
def phase(name: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar in a terminal and, at the end, a line with the seconds; yields a function to call after each of `total` steps."""
    started = time.perf_counter()
    with tqdm(total=total, desc=f"  {name}", leave=False, disable=None) as bar:

        def tick(steps: int = 1) -> None:
            bar.update(steps)

        yield tick
    say(f"  {name}: {time.perf_counter() - started:.1f} s")


def say(text: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)
