"""Which sampling serves a model best: its settings against quality and cost, on one text. How it is called: command_line.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import atomic_write, write_text
from pretrain.evaluate.command_line import EVALUATIONS, combinations, judges_of, read_sweep, samples_folder
from pretrain.evaluate.evaluate import figures, result, work_of
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import finish
from pretrain.evaluate.samples import draw_samples
from pretrain.evaluate.subjects import FlowSubject, Sampling, open_subject
from pretrain.evaluate.tables import shown

LOWER_IS_BETTER = ("generative_nll", "repetition", "copied_from_prompt", "copied_from_training", "seconds")


class Point(NamedTuple):
    """A combination, what it costs, and what came out."""

    settings: dict[str, Any]
    evaluations: float
    metrics: dict[str, Any]


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
    """Into the generation_config.json of an exported folder. Raises: UserError."""
    path = Path(model) / "generation_config.json"
    if not path.is_file():
        raise UserError(f"--write-defaults: {model} has no {path.name}; expected a folder that textldm convert wrote")
    named = {"temperature" if name == "token_temperature" else name: value for name, value in settings.items()}
    config = json.loads(path.read_text(encoding="utf-8")) | named
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> int:
    """Measure every combination, print, plot and write. Raises: UserError."""
    args = read_sweep(argv)
    settings = combinations(args)
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
