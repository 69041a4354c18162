"""Go or no-go: measure, judge, write and print. How it is called, and what comes out: command_line.py."""

import json
import math
import sys
import time
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import cli
from data_pipeline.core.hub import without_hub
from data_pipeline.core.storage import atomic_write
from data_pipeline.core.telling import tellable
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.diagnose.command_line import JSON_NAME, PAGE_NAME, given_keys, make_parser, read
from pretrain.diagnose.page import Panel, draw
from pretrain.diagnose.verdicts import Figures, Verdict, table
from pretrain.runs.record import RunRecord
from pretrain.stages.build import load_stage
from pretrain.stages.recorded import check_recorded

__all__ = ["main", "make_parser"]


def diagnose(
    config: RunConfig, run: Path, device: torch.device, given: Collection[str] = ()
) -> tuple[Figures, list[Verdict], list[Panel]]:
    """Everything that is measured about a run, the verdicts by check, and the page's panels; `given` are the keys that the user set.

    Raises: UserError.
    """
    diagnosis, path = stage_kind(config.stage).load("diagnosis"), checkpoint_of(run)
    assert diagnosis is not None  # command_line.read
    saved = read_manifest(path)
    check_recorded(config, RunRecord.of_checkpoint(saved), given)
    stage = load_stage(config, path, device)
    figures: Figures = {"run": str(run), "stage": config.stage, "step": saved.step}
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        figures |= diagnosis.measure(stage, device)
    verdicts = sorted(diagnosis.judge(figures, config), key=lambda verdict: verdict.check)
    return figures, verdicts, list(diagnosis.panels(figures))


def finite(value: Any) -> Any:
    """A copy of a JSON-able value with None in place of nan and infinities."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    try:
        return run(argv)
    except Exception:  # Python would end with 1, which says no-go
        print(tellable(traceback.format_exc()), end="", file=sys.stderr)
        return 2


@cli
def run(argv: list[str] | None = None) -> int:
    """Measure, judge, write and print."""
    arguments, config = read(argv)
    device = device_of(arguments.device)
    output = arguments.output or arguments.run
    output.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, PAGE_NAME):  # an old verdict must not outlive a diagnosis that fails
        (output / name).unlink(missing_ok=True)
    started = time.perf_counter()
    with without_hub():  # the run may be anybody's: which model is fetched is the user's to say
        figures, verdicts, panels = diagnose(config, arguments.run, device, given_keys(arguments))
    failed = [verdict for verdict in verdicts if verdict.passed is False]
    judged = sum(verdict.passed is not None for verdict in verdicts)
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["verdict"] = "no-go" if failed else "go" if judged else "not measured"
    title = f"{arguments.run}: stage {config.stage}, step {figures['step']:,}"
    draw(figures, verdicts, panels, title, output / PAGE_NAME)
    record = finite(figures | {"checks": [verdict.record() for verdict in verdicts]})
    with atomic_write(output / JSON_NAME) as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False).encode())
    print(f"\n{title}\n\n{table(verdicts)}\n")
    for sample in figures.get("samples", [])[:1]:
        print(f"one continuation:\n  ... {sample['context'][-160:]!r}\n  >>> {sample['generated'][:400]!r}\n")
    print(f"{output / JSON_NAME}, {output / PAGE_NAME}")
    if failed:
        print(f"NO-GO: {len(failed)} of {judged} thresholds missed: {'; '.join(verdict.name for verdict in failed)}")
    elif judged:
        print(f"GO: all {judged} thresholds met")
    else:
        print("NOT MEASURED: no figure has met or missed a threshold")
    return 1 if failed else 0 if judged else 2


if __name__ == "__main__":
    raise SystemExit(main(None))
