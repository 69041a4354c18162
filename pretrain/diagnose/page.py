"""The diagnosis as one page: the stage's panels (panels.py), and the table of verdicts below them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from pretrain.diagnose.verdicts import Figures, Verdict

Panel = Callable[[Axes, Figures], None]
"""Draws some of the figures."""

INK, GRID = "#222222", "#dddddd"
MODEL, TRUE, FOREIGN = "#1f4e9c", "#3a7d44", "#c0392b"
FLOOR_COLORS = {"blind": "#9a9a9a", "covariance": "#d18f00"}
STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.color": INK,
}


def draw(figures: Figures, verdicts: Sequence[Verdict], panels: Sequence[Panel], title: str, path: Path) -> None:
    """Write the page as PNG."""
    columns = len(panels) if 0 < len(panels) <= 3 else 4
    rows = -(-len(panels) // columns)
    table_inches = 0.21 * (len(verdicts) + 2)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(3.6 * columns, 2.9 * rows + table_inches + 0.9), layout="constrained")
        go = figures["verdict"]
        figure.suptitle(
            f"{title}:  {go.upper()}",
            x=0.01,
            ha="left",
            fontsize=13,
            weight="bold",
            color=_color(go == "go"),
            parse_math=False,
        )
        below: Any = figure
        if panels:
            parts: Any = figure.subfigures(2, 1, height_ratios=[2.9 * rows, table_inches])
            above, below = parts
            grid = above.subplots(rows, columns, squeeze=False)
            for axes, panel in zip(grid.flat, panels):
                panel(axes, figures)
            for axes in list(grid.flat)[len(panels) :]:
                axes.set_visible(False)
        draw_table(below, verdicts)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _color(passed: bool | None) -> str:
    return {True: TRUE, False: FOREIGN, None: INK}[passed]


def draw_table(below: Any, verdicts: Sequence[Verdict]) -> None:
    """The verdicts as text."""
    axes = below.subplots()
    axes.set_axis_off()
    lines = [("check", "figure", "threshold", "", INK)]
    words = {True: "ok", False: "FAIL", None: ""}
    lines += [(f"{v.check}  {v.name}", v.figure, v.threshold, words[v.passed], _color(v.passed)) for v in verdicts]
    for i, (*cells, color) in enumerate(lines):
        for x, cell in zip((0.0, 0.42, 0.72, 0.86), cells):
            weight = "bold" if i == 0 or (color == FOREIGN and x) else "normal"
            axes.text(x, 1 - (i + 0.5) / len(lines), cell, color=color, weight=weight, va="center", fontsize=9)
