"""Go or no-go: the checks that tell a healthy run from one whose loss only looks fine (docs/diagnosis.md).

    textldm diagnose --run runs/vae_base        is this latent space fit for diffusion?
    textldm diagnose --run runs/dit_xl          does it model language? (its VAE included)

Measures the EMA weights of the newest complete checkpoint on held-out rows, prints a table, and writes diagnosis.json and
diagnosis.png into the run folder. Thresholds and sizes: section `diagnose` of the run's configuration (--set diagnose.rows=64).
Exit code 0: go, 1: no-go, 2: it could not be measured.
"""

import argparse
import json
import math
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import atomic_write
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.registry import part, stage_kind
from pretrain.config.schema import RunConfig
from pretrain.diagnose.page import Panel, draw
from pretrain.diagnose.verdicts import Figures, Verdict, table
from pretrain.runs.folder import config_of
from pretrain.stages.build import load_stage

JSON_NAME, PAGE_NAME = "diagnosis.json", "diagnosis.png"


def diagnose(config: RunConfig, run: Path, device: torch.device) -> tuple[Figures, list[Verdict], list[Panel]]:
    """Everything that is measured about a run, the verdicts by check, and the page's panels. Raises: UserError."""
    place = stage_kind(config.stage).diagnosis
    if place is None:
        raise UserError(f"{run} is a run of stage {config.stage}, which has no diagnosis")
    diagnosis, path = part(place), checkpoint_of(run)
    stage = load_stage(config, path, device)
    figures: Figures = {"run": str(run), "stage": config.stage, "step": read_manifest(path).step}
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


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm diagnose", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a stage-1 or stage-2 run")
    parser.add_argument("--output", type=Path, help=f"folder for {JSON_NAME} and {PAGE_NAME} (the run folder)")
    parser.add_argument("--rows", type=int, help="held-out rows to measure (diagnose.rows)")
    parser.add_argument("--guidance-scale", type=float, help="of the generated text (diagnose.guidance_scale)")
    parser.add_argument("--num-steps", type=int, help="solver steps of the generated text (diagnose.num_steps)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    try:
        return run(argv)
    except Exception:  # Python would end with 1, which says no-go
        traceback.print_exc()
        return 2


@cli
def run(argv: list[str] | None = None) -> int:
    """Measure, judge, write and print."""
    arguments = make_parser().parse_args(argv)
    given = {name: getattr(arguments, name) for name in ("rows", "guidance_scale", "num_steps")}
    overrides = [f"diagnose.{name}={value}" for name, value in given.items() if value is not None]
    config = config_of(arguments.run, [*arguments.set, *overrides])
    device = device_of(arguments.device)
    output = arguments.output or arguments.run
    output.mkdir(parents=True, exist_ok=True)
    for name in (JSON_NAME, PAGE_NAME):  # an old verdict must not outlive a diagnosis that fails
        (output / name).unlink(missing_ok=True)
    started = time.perf_counter()
    figures, verdicts, panels = diagnose(config, arguments.run, device)
    failed = [verdict for verdict in verdicts if verdict.passed is False]
    figures["seconds"] = round(time.perf_counter() - started, 1)
    figures["verdict"] = "no-go" if failed else "go"
    title = f"{arguments.run}: stage {config.stage}, step {figures['step']:,}"
    draw(figures, verdicts, panels, title, output / PAGE_NAME)
    record = finite(figures | {"checks": [verdict.record() for verdict in verdicts]})
    with atomic_write(output / JSON_NAME) as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False).encode())
    print(f"\n{title}\n\n{table(verdicts)}\n")
    for sample in figures.get("samples", [])[:1]:
        print(f"one continuation:\n  ... {sample['context'][-160:]!r}\n  >>> {sample['generated'][:400]!r}\n")
    print(f"{output / JSON_NAME}, {output / PAGE_NAME}")
    judged = sum(verdict.passed is not None for verdict in verdicts)
    if failed:
        print(f"NO-GO: {len(failed)} of {judged} thresholds missed: {'; '.join(verdict.name for verdict in failed)}")
    else:
        print(f"GO: all {judged} thresholds met")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(None))
