"""How many steps Muon needs for what AdamW reaches.

    python -m benchmarks.muon                                # on what ./run.sh left: its data, its VAE, its DiT's configuration
    python -m benchmarks.muon --run runs/x/dit --steps 4000

The run's configuration is trained anew from its start, by AdamW for `--steps`, at the best of the given learning rates, and by Muon for
the given shares of them, each with a schedule of its own length; what is compared is the last held-out evaluation, with EMA weights: nats a
token where the run measures them, else the flow loss (`figure` says which).

`steps_ratio`: Muon's steps for AdamW's last figure over AdamW's steps, between the shares by interpolation in the logarithm of the steps;
below the smallest share it is that share, and null if the largest is not enough. `seconds_ratio`: of a training step, Muon's over AdamW's;
medians of runs one after the other, so only on a quiet machine.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring import ROOT, existing, phase, print_figures
from data_pipeline.core.errors import UserError, cli
from pretrain import train
from pretrain.engine.optimizer_settings import optimizer_settings
from pretrain.telemetry.sinks import read_metrics

FIGURES = ("eval/nats", "eval/nats_per_token", "eval/flow")
"""Of a held-out evaluation; the first that it has is compared."""


class Trained(NamedTuple):
    """Last held-out figure of a run, its name, and the median seconds of its steps."""

    figure: float
    name: str
    step_s: float


def trained(config: Path, folder: Path, steps: int, settings: Sequence[str]) -> Trained:
    """Train a configuration from its start. Raises: UserError if that fails."""
    overrides = [
        f"train.steps={steps}", f"train.eval_every={steps}", "train.eval_samples=0", f"train.checkpoint_every={steps}",
        f"schedule.warmup_steps={min(100, steps // 10)}", *settings,
    ]  # fmt: skip
    flags = [flag for override in overrides for flag in ("--set", override)]
    code = train.main(["--config", str(config), "--run", str(folder), *flags])
    if code:
        raise UserError(f"training in {folder} ended with exit code {code}; see above")
    last = read_metrics(folder, "eval")[-1]
    name = next(name for name in FIGURES if name in last)
    return Trained(last[name], name, statistics.median(line["step_s"] for line in read_metrics(folder)))


def section(config: Path, kind: str) -> str:
    """The configuration's optimizer section as a setting, for another kind: the keys that this one has."""
    values = json.loads(config.read_text(encoding="utf-8"))["optimizer"]
    known = optimizer_settings(kind).model_fields
    return "optimizer=" + json.dumps({key: value for key, value in values.items() if key in known} | {"kind": kind})


def steps_ratio(target: float, by_share: dict[float, float]) -> float | None:
    """The share at which the figure comes down to `target`; see the module's text."""
    shares = sorted(by_share)
    if by_share[shares[0]] <= target:
        return shares[0]
    for low, high in itertools.pairwise(shares):
        if by_share[high] <= target:
            way = (by_share[low] - target) / (by_share[low] - by_share[high])
            return math.exp(math.log(low) + way * (math.log(high) - math.log(low)))
    return None


def measure(
    config: Path, folder: Path, steps: int, shares: Sequence[float], rates: Sequence[float], muon: Sequence[str]
) -> dict[str, Any]:
    """The figures; runs go to `folder`."""
    by_rate: dict[float, Trained] = {}
    for rate in rates:
        with phase(f"AdamW, {steps} steps at {rate:g}"):
            settings = [section(config, "adamw"), f"optimizer.lr={rate}"]
            by_rate[rate] = trained(config, folder / f"adamw-{rate:g}", steps, settings)
        print(f"AdamW at {rate:g}: {by_rate[rate].figure:.4f}", flush=True)
    adamw = min(by_rate.values(), key=lambda run: run.figure)
    found: dict[float, Trained] = {}
    for share in shares:
        with phase(f"Muon, {round(share * steps)} steps"):
            run = folder / f"muon-{share:g}"
            found[share] = trained(config, run, round(share * steps), [section(config, "muon"), *muon])
        print(f"AdamW {adamw.figure:.4f}, Muon at {share:g} of the steps {found[share].figure:.4f}", flush=True)
    return {
        "steps_ratio": steps_ratio(adamw.figure, {share: run.figure for share, run in found.items()}),
        "seconds_ratio": statistics.median(run.step_s for run in found.values()) / adamw.step_s,
        "figure": adamw.name,
        "adamw": adamw.figure,
        "adamw_by_rate": {f"{rate:g}": run.figure for rate, run in by_rate.items()},
        "muon": {f"{share:g}": run.figure for share, run in found.items()},
        "steps": steps,
        "muon_settings": list(muon),
    }


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.muon", description="Steps that Muon needs for what AdamW reaches."
    )
    run = ROOT / "runs/quickstart/dit"
    parser.add_argument("--run", type=Path, default=run, help="the run whose configuration is trained (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of AdamW (%(default)s)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.4, 0.6, 0.75], help="of them for Muon, a run each (%(default)s)"
    )
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.002, 0.004], help="learning rates of AdamW (%(default)s)"
    )
    parser.add_argument(
        "--muon", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, e.g. optimizer.matrix_lr=0.03"
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or not all(share * arguments.steps >= 1 for share in arguments.shares):
        raise UserError(f"--steps {arguments.steps} --shares {arguments.shares}: expected at least one step each")
    config = existing(arguments.run / "config.json", "--run")
    with tempfile.TemporaryDirectory(prefix="muon-benchmark-") as folder:
        print_figures(measure(config, Path(folder), arguments.steps, arguments.shares, arguments.rates, arguments.muon))


if __name__ == "__main__":
    sys.exit(main(None))
