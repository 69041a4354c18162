"""Two pictures of a finished recipe: how it learned, and how a text comes out of noise.

    textldm report --run runs/dit_xl --trajectory trajectory.json --output runs/dit_xl

losses.png: the training losses of both stages, the held-out nats per token beside the unigram's, and the held-out flow loss per quarter
of t with its floors.
denoising.png: one sample's text at several t, from the list of {"t", "text"} that `textldm generate --trajectory` writes.
"""

import argparse
import difflib
import json
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from data_pipeline.core.errors import UserError, cli
from pretrain.diagnose.page import FLOOR_COLORS, FOREIGN, INK, MODEL, STYLE, TRUE, plt
from pretrain.telemetry.sinks import read_metrics

LOSSES_NAME, DENOISING_NAME = "losses.png", "denoising.png"
QUARTER_TITLES = ("t < ¼: nearly clean", "¼ < t < ½", "½ < t < ¾", "t > ¾: nearly noise")
FAINT = "#b9c9e6"
PENDING = "#a8a8a8"
SHOWN_TIMES = 9
COLUMNS, MAX_LINES = 96, 5

Lines = list[dict[str, Any]]


def draw_losses(run: Path, vae_run: Path | None, path: Path) -> None:
    """Write losses.png. Raises: UserError when a run has no metrics."""
    dit, vae = metrics_of(run), metrics_of(vae_run) if vae_run else None
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(14, 6.4), layout="constrained")
        grid = figure.add_gridspec(2, 4)
        if vae:
            _draw_reconstruction(figure.add_subplot(grid[0, 0]), *vae)
            _draw_shares(figure.add_subplot(grid[0, 1]), *vae)
        _draw_flow(figure.add_subplot(grid[0, 2] if vae else grid[0, :2]), *dit)
        _draw_nats(figure.add_subplot(grid[0, 3] if vae else grid[0, 2:]), *dit)
        for quarter in range(4):
            _draw_quarter(figure.add_subplot(grid[1, quarter]), *dit, quarter)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def metrics_of(run: Path) -> tuple[Lines, Lines]:
    """A run's logged steps and held-out evaluations. Raises: UserError."""
    steps, evaluations = read_metrics(run), read_metrics(run, "eval")
    if not steps:
        raise UserError(f"{run} has no logged steps in metrics.jsonl; expected the folder of a training run")
    return steps, evaluations


def series(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is logged and finite."""
    found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential average over about a fortieth of the run, without a bias towards its first value."""
    decay = math.exp(-1 / max(len(values) / 40, 1))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def _draw_reconstruction(axes: Any, steps: Lines, evaluations: Lines) -> None:
    axes.plot(*series(steps, "ce"), color=FAINT, lw=2.5, label="training")
    axes.plot(*series(evaluations, "eval/ce"), "o-", color=MODEL, ms=3, lw=1.2, label="held-out")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Stage 1: cross-entropy per token")
    axes.set_xlabel("step")
    axes.legend()


def _draw_shares(axes: Any, steps: Lines, evaluations: Lines) -> None:
    names = {"token_accuracy": TRUE, "repa_cosine": MODEL, "repa_cosine_excess": FLOOR_COLORS["covariance"]}
    labels = ("tokens given back", "REPA cosine", "REPA cosine above shuffled pairs")
    for (name, color), label in zip(names.items(), labels):
        held_out = series(evaluations, f"eval/{name}")
        place = held_out if held_out[0] else series(steps, name)
        if place[0]:
            axes.plot(*place, "o-", color=color, ms=3, lw=1.2, label=label)
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.03)
    axes.set_title("Stage 1, held-out")
    axes.set_xlabel("step")
    axes.legend(loc="best")


def _draw_flow(axes: Any, steps: Lines, evaluations: Lines) -> None:
    places, values = series(steps, "flow")
    if values:
        axes.plot(places, values, color=FAINT, lw=1, label="training, as logged")
        axes.plot(places, smooth(values), color=MODEL, lw=1.8, label="training, smoothed")
        top = sorted(values)[-max(1, len(values) // 50)]
        axes.set_ylim(min(values) * 0.95, top * 1.03)
    axes.set_title("Stage 2: flow loss per channel, over all t")
    axes.set_xlabel("step")
    axes.legend()


def _draw_nats(axes: Any, steps: Lines, evaluations: Lines) -> None:
    axes.plot(*series(evaluations, "eval/nats"), "o-", color=MODEL, ms=3, lw=1.5, label="held-out bound")
    axes.plot(*series(evaluations, "eval/unigram_nats"), color=FOREIGN, lw=1.2, label="unigram")
    axes.set_title("Stage 2: nats per token")
    axes.set_xlabel("step")
    axes.legend()


def _draw_quarter(axes: Any, steps: Lines, evaluations: Lines, quarter: int) -> None:
    lines, prefix = (evaluations, "eval/") if series(evaluations, "eval/flow_q1")[0] else (steps, "")
    places, values = series(lines, f"{prefix}flow_q{quarter + 1}")
    axes.plot(places, values, "o-" if prefix else "-", color=MODEL, ms=3, lw=1.5)
    floors = {}
    for name in FLOOR_COLORS:
        _, found = series(lines, f"{prefix}{name}_floor_q{quarter + 1}")
        if found:
            floors[name] = sum(found) / len(found)
            axes.axhline(floors[name], color=FLOOR_COLORS[name], lw=1.2)
    if values:
        # What the first evaluation lies above the floors says nothing: the picture is of the floors' neighbourhood.
        highest = max([*floors.values(), values[-1]])
        lowest = min([*floors.values(), *values])
        margin = 0.12 * (highest - lowest) or 0.1
        axes.set_ylim(lowest - margin, highest + margin)
    _label_floors(axes, floors)
    axes.set_title(QUARTER_TITLES[quarter])
    axes.set_xlabel("step")
    if quarter == 0:
        axes.set_ylabel(f"{'held-out' if prefix else 'training'} flow loss")


def _label_floors(axes: Any, floors: dict[str, float]) -> None:
    """Names at the right of their lines, moved apart where lines are close."""
    low, high = axes.get_ylim()
    place = -math.inf
    for name, value in sorted(floors.items(), key=lambda item: item[1]):
        place = max(value, place + 0.07 * (high - low))
        axes.text(
            1.01,
            place,
            name.replace("_", " "),
            color=FLOOR_COLORS[name],
            fontsize=8,
            va="center",
            transform=axes.get_yaxis_transform(),
        )


def read_trajectory(path: Path) -> list[tuple[float, str]]:
    """A trajectory file's (t, text) pairs by falling t, from noise to data. Raises: UserError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [(float(entry["t"]), str(entry["text"])) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a trajectory ({type(error).__name__}: {error}); expected the JSON list of"
            ' {"t", "text"} that textldm generate --trajectory writes'
        ) from None
    if not found:
        raise UserError(f"{path} is an empty list; expected at least one entry with t and text")
    return sorted(found, key=lambda entry: -entry[0])


def choose(entries: Sequence[tuple[float, str]], number: int = SHOWN_TIMES) -> list[tuple[float, str]]:
    """At most `number` of the entries: the first, the last, and between them those nearest to equally spaced t, each once."""
    if len(entries) <= number:
        return list(entries)
    first, last = entries[0][0], entries[-1][0]
    wanted = [first + (last - first) * i / (number - 1) for i in range(number)]
    inner = {min(range(1, len(entries) - 1), key=lambda i: abs(entries[i][0] - t)) for t in wanted[1:-1]}
    return [entries[i] for i in sorted({0, *inner, len(entries) - 1})]


def settled_words(text: str, final: str) -> list[tuple[str, bool]]:
    """The text's words and spaces, each with whether it is part of the final text, in the same order."""
    own, last = (re.findall(r"\s+|\S+", one) for one in (text, final))
    settled = [False] * len(own)
    for block in difflib.SequenceMatcher(None, own, last, autojunk=False).get_matching_blocks():
        settled[block.a : block.a + block.size] = [True] * block.size
    return list(zip(own, settled))


def wrapped(words: Sequence[tuple[str, bool]], columns: int, max_lines: int) -> list[list[tuple[str, bool]]]:
    """Words in lines of at most so many characters; the last one ends in an ellipsis if more was to come."""
    lines: list[list[tuple[str, bool]]] = [[]]
    used = 0
    for word, settled in words:
        if word.isspace():
            word = " "
        for piece in textwrap.wrap(word, columns, drop_whitespace=False) or [word]:
            if used + len(piece) > columns:
                if len(lines) == max_lines:
                    lines[-1].append((" ...", False))
                    return lines
                lines.append([])
                used = 0
            if piece == " " and not used:
                continue
            lines[-1].append((piece, settled))
            used += len(piece)
    return lines


def printable(text: str) -> str:
    """The text with a dot for every character that does not take exactly one column: undecodable bytes, controls, wide characters."""
    return "".join(
        c if c.isspace() or (c.isprintable() and ord(c) < 0x2E80 and c != "\ufffd") else "·" for c in text
    ).strip()


def draw_denoising(trajectory: Path, path: Path) -> None:
    """Write denoising.png. Raises: UserError."""
    shown = choose([(t, printable(text)) for t, text in read_trajectory(trajectory)])
    final = shown[-1][1]
    blocks = [(t, wrapped(settled_words(text, final), COLUMNS, MAX_LINES)) for t, text in shown]
    num_lines = sum(len(lines) for _, lines in blocks) + 0.7 * len(blocks)
    inch, character, left = 0.2, 0.0836, 0.9  # line height and column of 10-point monospace, room for t
    width, height = left + character * (COLUMNS + 5), inch * num_lines + 0.75
    with plt.rc_context({"font.family": "monospace", "font.size": 10, "text.parse_math": False}):
        figure = plt.figure(figsize=(width, height))
        figure.text(
            0.12 / width, 1 - 0.22 / height, "One sample on its way from noise (t = 1) to words (t = 0)", fontsize=12,
            weight="bold", color=INK, va="center", family="sans-serif",
        )  # fmt: skip
        figure.text(
            0.12 / width, 1 - 0.46 / height, "dark: words that stay to the end", fontsize=9, color=INK, va="center",
            family="sans-serif",
        )  # fmt: skip
        y = 0.8
        for t, lines in blocks:
            figure.text(0.12 / width, 1 - y / height, f"t={t:.2f}", color=MODEL, weight="bold", va="center")
            for line in lines:
                column = 0
                for piece, settled in line:  # each by itself: a run's width on screen is not a whole number of columns
                    if piece != " ":
                        x = (left + column * character) / width
                        figure.text(x, 1 - y / height, piece, color=INK if settled else PENDING, va="center")
                    column += len(piece)
                y += inch
            y += 0.7 * inch
        figure.savefig(path, dpi=130, facecolor="white")
        plt.close(figure)


def vae_of(run: Path) -> Path | None:
    """The stage-1 run that a DiT's run names, if it is there."""
    try:
        named = json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]["vae"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(named) if (Path(named) / "metrics.jsonl").is_file() else None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a stage-2 run")
    parser.add_argument("--vae-run", type=Path, help="its stage-1 run (the one that its config names)")
    parser.add_argument("--trajectory", type=Path, help="JSON file of textldm generate --trajectory")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {LOSSES_NAME} and {DENOISING_NAME}")
    return parser


@cli
def main(argv: list[str] | None = None) -> int:
    """Draw the pictures."""
    arguments = make_parser().parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw_losses(arguments.run, arguments.vae_run or vae_of(arguments.run), arguments.output / LOSSES_NAME)
    print(arguments.output / LOSSES_NAME)
    if arguments.trajectory:
        draw_denoising(arguments.trajectory, arguments.output / DENOISING_NAME)
        print(arguments.output / DENOISING_NAME)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(None))
