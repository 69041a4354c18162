"""Line charts as SVG inside a page: axes with round numbers, labels at the lines' own ends, the values as tooltips.

Colours and fonts are the page's (page.css has a class for each role), so a chart follows its light and dark. All charts have one size in
which a letter is a letter: a page lays them out side by side, and one below the other on a phone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.report.markup import Html, compact, join, tag

WIDTH, HEIGHT = 352.0, 212.0
TOP, BOTTOM, LEFT, LEAST_RIGHT = 10.0, 30.0, 48.0, 46.0
LETTER = 6.8
"""Width of a label's character at its size in page.css, rather too much than too little."""
LABEL_GAP = 13.0
MOST_POINTS = 400
"""Of a line: more than there are pixels."""
MOST_TIPS = 80
LOG_FROM = 40.0
"""Ratio of the largest to the smallest value from which an axis that may be is logarithmic."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values over x, in its order.

    `role` is its colour and stroke in page.css. `faint`: behind the others and without a label. `tips`: its values are told where the
    pointer is; of a line that was made out of another, the other's are.
    """

    label: str
    points: Sequence[Point]
    role: str = "train"
    dots: bool = False
    faint: bool = False
    tips: bool = True


@dataclass(frozen=True)
class Level:
    """A value that holds for every x."""

    label: str
    value: float
    role: str = "floor"


@dataclass(frozen=True)
class Axis:
    """Of y. `form` gives a value as a label. `log`: "auto" decides by the values. `zero`: begins at 0. `top`: ends at least there."""

    form: Callable[[float], str] = "{:.4g}".format
    log: bool | str = "auto"
    zero: bool = False
    top: float | None = None


def percent(value: float) -> str:
    """A share as a label."""
    return f"{100 * value:.3g}%"


def smooth(points: Sequence[Point]) -> list[Point]:
    """Exponential average over about a thirtieth of the points, forwards and then backwards: it lags behind in neither direction."""
    forwards = _averages([y for _, y in points])
    backwards = _averages(forwards[::-1])[::-1]
    return [(x, y) for (x, _), y in zip(points, backwards)]


def _averages(values: Sequence[float]) -> list[float]:
    decay = math.exp(-1 / max(len(values) / 60, 1))
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        averages.append(total / weight)
    return averages


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points of a line, with the lowest and the highest of every stretch, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        if stretch:
            kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def evenly(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points at even distances, the last one among them."""
    if len(points) <= most:
        return list(points)
    return [points[(i + 1) * len(points) // most - 1] for i in range(most)]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from low to high, at most so many: multiples of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if 2 <= last - first + 1 <= most:
            return [number * step for number in range(first, last + 1)]
    return [low, high]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers of a logarithmic axis: powers of ten, with their 2 and 5 fold where there is room."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) <= most:
            return found or [low, high]
    return found[:: math.ceil(len(found) / most)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places of labels, moved as little as need be to stand `gap` apart in their order, between low and high as far as they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups: list[list[float]] = []  # [sum of wanted first places, number of labels]: a group's labels stand gap by gap
    for place in (places[i] for i in order):
        groups.append([place, 1])
        while len(groups) > 1 and _first(groups[-2], gap, low, high) + groups[-2][1] * gap > _first(
            groups[-1], gap, low, high
        ):
            total, number = groups.pop()
            groups[-1][0] += total - number * groups[-1][1] * gap
            groups[-1][1] += number
    moved = [_first(group, gap, low, high) + i * gap for group in groups for i in range(int(group[1]))]
    found = [0.0] * len(places)
    for i, place in zip(order, moved):
        found[i] = place
    return found


def _first(group: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where a group's first label stands: its wanted mean, within the limits."""
    return max(low, min(group[0] / group[1], high - (group[1] - 1) * gap))


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _y_scale(values: Sequence[float], axis: Axis) -> _Scale:
    low, high = min(values), max([*values, *([] if axis.top is None else [axis.top])])
    log = axis.log is True or (axis.log == "auto" and not axis.zero and low > 0 and high / low >= LOG_FROM)
    if log and low > 0:
        margin = (high / low) ** 0.06 if high > low else 2.0
        return _Scale(low / margin, high * margin, HEIGHT - BOTTOM, TOP, log=True)
    if axis.zero:
        low = min(low, 0.0)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bottom = low if axis.zero and low == 0 else low - margin
    return _Scale(bottom, high + margin, HEIGHT - BOTTOM, TOP)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Labels of an axis, all with as many digits as the finest needs; thousands and millions by their letter."""
    top = max(map(abs, values), default=0.0)
    if top >= 10_000:
        return [compact(value) if value else "0" for value in values]
    if 0 < top < 0.001:
        return ["0" if value == 0 else f"{value:.0e}".replace("e-0", "e-") for value in values]
    for digits in range(8):
        if all(abs(round(value, digits) - value) <= 1e-6 * top for value in values):
            return [f"{value:,.{digits}f}" for value in values]
    return [f"{value:.3g}" for value in values]


def chart(
    title: str,
    lines: Sequence[Line],
    levels: Sequence[Level] = (),
    axis: Axis = Axis(),
    x_label: str = "step",
    x_range: tuple[float, float] | None = None,
    note: str = "",
) -> Html:
    """A figure with its caption.

    Args:
        x_range: what x spans at least; the lines' own without it.
        note: what the title does not say: a unit, what is better.

    Raises: ValueError, if there is nothing to draw.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        raise ValueError(f"{title}: no points")
    xs = [x for line in lines for x, _ in line.points] + list(x_range or ())
    scale_y = _y_scale([y for line in lines for _, y in line.points] + [level.value for level in levels], axis)
    named = [line for line in lines if not line.faint]
    alone = len(named) + len(levels) == 1
    ends = [(line.points[-1][1], line.label, line.role) for line in named]
    ends += [(level.value, level.label, level.role) for level in levels]
    labels = [
        (value, axis.form(value) if alone else f"{label} {axis.form(value)}", role) for value, label, role in ends
    ]
    right = max(LEAST_RIGHT, 8 + LETTER * max(len(label) for _, label, _ in labels))
    low, high = min(xs), max(xs)
    scale_x = _Scale(low, high if high > low else low + 1, LEFT, WIDTH - right)
    parts = [*_y_axis(scale_y, scale_x.end, percents=axis.form is percent), *_x_axis(scale_x, x_label)]
    for level in levels:
        parts.append(
            tag("line", class_=f"line {level.role}", x1=LEFT, x2=scale_x.end, y1=scale_y(level.value), y2=scale_y(level.value))
        )  # fmt: skip
    for line in sorted(lines, key=lambda line: not line.faint):
        parts += _drawn(line, scale_x, scale_y, axis, x_label)
    places = spread([scale_y(value) for value, _, _ in labels], LABEL_GAP, TOP + 2, HEIGHT - BOTTOM)
    for place, (_, label, role) in zip(places, labels):
        parts.append(tag("text", label, class_=f"label {role}", x=scale_x.end + 6, y=place + 4))
    drawing = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=_described(title, named, levels, axis),
    )
    return tag("figure", tag("figcaption", tag("b", title), *([" ", note] if note else [])), drawing, class_="chart")


def _described(title: str, lines: Sequence[Line], levels: Sequence[Level], axis: Axis) -> str:
    said = []
    for line in lines:
        (first_x, first), (last_x, last) = line.points[0], line.points[-1]
        said.append(f"{line.label} from {axis.form(first)} at {first_x:g} to {axis.form(last)} at {last_x:g}")
    return f"{title}: " + "; ".join([*said, *(f"{level.label} {axis.form(level.value)}" for level in levels)])


def _drawn(line: Line, scale_x: _Scale, scale_y: _Scale, axis: Axis, x_label: str) -> list[Html]:
    shown = thinned(line.points, MOST_POINTS)
    places = [(scale_x(x), scale_y(y)) for x, y in shown]
    role = f"{line.role}{' faint' if line.faint else ''}"
    parts = []
    if len(places) > 1:
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(tag("path", class_=f"line {role}", d=path))
    visible = line.dots and len(line.points) <= MOST_TIPS
    for x, y in evenly(line.points, MOST_TIPS) if line.tips else []:
        title = tag("title", f"{x_label} {x:,.10g}: {line.label} {y:.6g}")
        look: dict[str, Any] = {"class_": f"dot {role}", "r": 2.6} if visible else {"class_": "tip", "r": 5.0}
        parts.append(tag("circle", title, **look, cx=scale_x(x), cy=scale_y(y)))
    if not line.faint and not visible:
        parts.append(tag("circle", class_=f"dot {role}", r=2.2, cx=places[-1][0], cy=places[-1][1]))
    return parts


def _y_axis(scale: _Scale, right: float, percents: bool) -> list[Html]:
    values = log_ticks(scale.low, scale.high) if scale.log else ticks(scale.low, scale.high)
    if percents:
        texts = [f"{shown}%" for shown in tick_texts([100 * value for value in values])]
    elif scale.log:
        texts = [compact(value) if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-") for value in values]
    else:
        texts = tick_texts(values)
    parts = []
    for value, shown in zip(values, texts):
        y = scale(value)
        parts.append(tag("line", class_="grid", x1=LEFT, x2=right, y1=y, y2=y))
        parts.append(tag("text", shown, class_="tick y", x=LEFT - 6, y=y + 3.5))
    return parts


def _x_axis(scale: _Scale, label: str) -> list[Html]:
    y = HEIGHT - BOTTOM
    parts = [tag("line", class_="axis", x1=LEFT, x2=scale.end, y1=y, y2=y)]
    values = ticks(scale.low, scale.high, most=5)
    for value, shown in zip(values, tick_texts(values)):
        x = scale(value)
        parts.append(tag("line", class_="axis", x1=x, x2=x, y1=y, y2=y + 4))
        parts.append(tag("text", shown, class_="tick x", x=x, y=y + 15))
    parts.append(tag("text", label, class_="tick end", x=WIDTH, y=y + 15))
    return parts


def ladder(title: str, marks: Sequence[tuple[str, float, str]], note: str = "") -> Html:
    """A few values on one line, to see which lies where between which: (label, value, role)."""
    values = [value for _, value, _ in marks]
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    height, y, edge = 34.0 + 17.0 * len(marks), 16.0, 14.0
    scale = _Scale(low - margin, high + margin, edge, WIDTH - edge)
    parts = [tag("line", class_="axis", x1=edge, x2=WIDTH - edge, y1=y, y2=y)]
    order = sorted(marks, key=lambda mark: mark[1])
    for row, (label, value, role) in enumerate(order):
        x, below = scale(value), y + 17.0 * (row + 1) + 8
        anchor = "end" if x > WIDTH / 2 else "start"
        parts.append(tag("line", class_="grid", x1=x, x2=x, y1=y, y2=below - 9))
        parts.append(tag("circle", tag("title", f"{label} {value:.6g}"), class_=f"dot {role}", cx=x, cy=y, r=4.0))
        parts.append(tag("text", f"{label} {value:.3f}", class_=f"label {role} {anchor}", x=x, y=below + 3))
    told = f"{title}: " + "; ".join(f"{label} {value:.3f}" for label, value, _ in order)
    drawing = tag("svg", *parts, viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=told)
    return tag("figure", tag("figcaption", tag("b", title), *([" ", note] if note else [])), drawing, class_="chart")


def grid(charts: Sequence[Html]) -> Html:
    """Charts side by side, as many as there is room for."""
    return tag("div", join(charts), class_="charts")
