"""Which sampling serves a model best: its settings against quality and cost, on one text.

    textldm evaluate sweep --model export/x --benchmark my.jsonl --judge gpt2 --output results/sweep.json --guidance-scales 1 2 4

Every combination writes the same documents from the same noise. Cost: network evaluations a text, two for each step with guidance.
Quality: `--by`, one of the figures. The Pareto set are the settings that no other beats at the same or a lower cost.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write, write_text
from pretrain.evaluate.command_line import add_task, check_task, judges_of, samples_folder
from pretrain.evaluate.evaluate import figures, result, work_of
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import finish
from pretrain.evaluate.samples import draw_samples
from pretrain.evaluate.subjects import FlowSubject, Sampling, open_subject
from pretrain.evaluate.tables import shown

EVALUATIONS = {"euler": 1, "heun": 2, "multistep": 1}
"""Of the velocity in each step; other solvers count as one."""
LOWER_IS_BETTER = ("generative_nll", "repetition", "copied_from_prompt", "copied_from_training", "seconds")


class Point(NamedTuple):
    """A combination, what it costs, and what came out."""

    settings: dict[str, Any]
    evaluations: float
    metrics: dict[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm evaluate sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task(parser)
    parser.set_defaults(samples=100)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a plot and the texts go beside it")
    parser.add_argument(
        "--num-steps", type=int, nargs="+", default=[], help="default of each of these: the model's own"
    )
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[])
    parser.add_argument("--guidance-intervals", nargs="+", default=[], metavar="FROM:TO", help="times with guidance")
    parser.add_argument("--solvers", nargs="+", default=[], choices=list(EVALUATIONS))
    parser.add_argument("--token-temperatures", type=float, nargs="+", default=[])
    parser.add_argument("--by", default="generative_nll", help="the figure that is quality (%(default)s)")
    parser.add_argument(
        "--write-defaults",
        action="store_true",
        help="write the best settings into the exported folder, as its defaults",
    )
    return parser


def combinations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the values given. Raises: UserError."""
    axes = {
        "num_steps": args.num_steps,
        "guidance_scale": args.guidance_scales,
        "guidance_interval": [_interval(text) for text in args.guidance_intervals],
        "solver": args.solvers,
        "token_temperature": args.token_temperatures,
    }
    given = {name: values for name, values in axes.items() if values}
    if not given:
        raise UserError(
            "nothing to sweep; expected values of at least one of --num-steps, --guidance-scales, ... (--help)"
        )
    return [dict(zip(given, values)) for values in itertools.product(*given.values())]


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance-intervals {text}: expected FROM:TO with 0 <= FROM < TO <= 1, for example 0.2:0.8")
    return low, high


def evaluations(settings: dict[str, Any]) -> float:
    """Network evaluations a text: the steps' times those of the solver, and again those without context where there is guidance."""
    low, high = settings["guidance_interval"]
    share = 0.0 if settings["guidance_scale"] == 1 else high - low
    return settings["num_steps"] * EVALUATIONS.get(settings["solver"], 1) * (1 + share)


def pareto(points: Sequence[Point], by: str) -> list[int]:
    """Places of the points that none with the same or a lower cost beats, by falling quality's cost."""
    sign = 1 if by in LOWER_IS_BETTER else -1
    best, found = float("inf"), []
    order = sorted(range(len(points)), key=lambda i: (points[i].evaluations, sign * points[i].metrics[by]["value"]))
    for i in order:
        if sign * points[i].metrics[by]["value"] < best:
            best = sign * points[i].metrics[by]["value"]
            found.append(i)
    return found


def plot(points: Sequence[Point], best: Sequence[int], by: str, path: Path) -> None:
    """Quality against network evaluations, the Pareto set joined by a line."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    values = [point.metrics[by] for point in points]
    axes.errorbar(
        [point.evaluations for point in points],
        [value["value"] for value in values],
        yerr=[[value["value"] - value["low"] for value in values], [value["high"] - value["value"] for value in values]],
        fmt="o", color="0.6", ms=4,
    )  # fmt: skip
    axes.plot(
        [points[i].evaluations for i in best],
        [points[i].metrics[by]["value"] for i in best],
        "o-",
        color="C0",
        label="Pareto set",
    )
    axes.set(xlabel="network evaluations a text", ylabel=by.replace("_", " "), xscale="log")
    axes.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)


def write_defaults(model: str, settings: dict[str, Any]) -> None:
    """Into the config.json of an exported folder. Raises: UserError."""
    path = Path(model) / "config.json"
    if not path.is_file():
        raise UserError(f"--write-defaults: {model} is no folder; export it, or download it, first")
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {name: value for name, value in settings.items() if name != "guidance_interval"}
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> int:
    """Measure every combination, print, plot and write. Raises: UserError."""
    args = make_parser().parse_args(argv)
    check_task(args)
    settings = combinations(args)
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: expected a file that ends in .json")
    device = device_of(args.device)
    first = open_subject(args.model, Sampling(), device, None, 1, 1)
    if not isinstance(first, FlowSubject):
        raise UserError(f"--model {args.model}: expected an exported TextLDM, whose sampling has these settings")
    drawn = draw_samples(args.benchmark, args.samples, args.seed, args.max_words, args.text_field, args.split)
    points: list[Point] = []
    for number, chosen in enumerate(settings):
        subject = FlowSubject(first.model, first.texts, Sampling(**chosen))
        print(
            f"{number + 1}/{len(settings)}: " + ", ".join(f"{name} {value}" for name, value in chosen.items()),
            flush=True,
        )
        name = (
            "-".join(f"{key}={value}" for key, value in chosen.items())
            .replace(" ", "")
            .replace("(", "")
            .replace(")", "")
        )
        work, record_settings = work_of(args, drawn, subject)
        records = finish(work, samples_folder(args.output) / name, record_settings)
        assert records is not None  # one process
        metrics, left_out, protocol = figures(
            Judged(drawn.samples, records), judges_of(args), args.data, args.data_rows, args.seed, device
        )
        if args.by not in metrics:
            why = left_out.get(args.by, f"expected one of {', '.join(metrics)}")
            raise UserError(f"--by {args.by} is not measured: {why}")
        everything = result(record_settings, drawn, metrics, left_out, protocol)
        points.append(Point(subject.sampling, evaluations(subject.sampling), everything["metrics"]))
    best = pareto(points, args.by)
    rows = [
        [
            "*" if i in best else "",
            *(point.settings[name] for name in settings[0]),
            point.evaluations,
            shown(args.by, point.metrics[args.by]),
        ]
        for i, point in enumerate(points)
    ]
    print("\n" + tabulate(rows, headers=["", *settings[0], "evaluations", args.by]) + "\n*: Pareto set")
    report = {
        "model": args.model, "benchmark": args.benchmark, "by": args.by, "pareto": best, "best": points[best[-1]].settings,
        "points": [point._asdict() for point in points],
    }  # fmt: skip
    write_text(args.output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    plot(points, best, args.by, args.output.with_suffix(".png"))
    if args.write_defaults:
        write_defaults(args.model, points[best[-1]].settings)
    print(f"{args.output}, {args.output.with_suffix('.png')}")
    return 0
