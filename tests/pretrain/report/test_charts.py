"""Charts show the numbers that they were given, on axes with round ones."""

import itertools
import math
import random
import re
import xml.etree.ElementTree as ET

import pytest

from pretrain.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_TIPS,
    TOP,
    WIDTH,
    Axis,
    Level,
    Line,
    chart,
    evenly,
    ladder,
    log_ticks,
    percent,
    smooth,
    spread,
    thinned,
    tick_texts,
    ticks,
)  # fmt: skip


def elements(drawn: str, name: str, class_: str = "") -> list[ET.Element]:
    """Of a chart, which is well-formed."""
    return [one for one in ET.fromstring(drawn).iter(name) if class_ in (one.get("class") or "").split() or not class_]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (4.51, 5.76), (0, 400), (-3, 1e6), (2.1e-5, 3.3e-5), (17.2, 17.3)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 5
    assert low - 1e-9 * abs(low) <= found[0] < found[-1] <= high * (1 + 1e-9)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 2.5, 5)) < 1e-6
    assert all(value / step == pytest.approx(round(value / step), abs=1e-5) for value in found)


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(0.02, 7) == pytest.approx([0.03, 0.1, 0.3, 1, 3])
    assert log_ticks(1e-9, 1e9)[1] / log_ticks(1e-9, 1e9)[0] == pytest.approx(1e4)


@pytest.mark.parametrize(
    ("values", "shown"),
    [([0, 0.5, 1], ["0.0", "0.5", "1.0"]), ([0, 1000, 2000], ["0", "1,000", "2,000"]), ([0, 0.0025], ["0.0000", "0.0025"]),
     ([0, 20_000, 1_500_000], ["0", "20.0k", "1.50M"]), ([0, 2e-4], ["0", "2e-4"])],
)  # fmt: skip
def test_labels_of_an_axis_have_the_same_digits(values: list[float], shown: list[str]) -> None:
    assert tick_texts(values) == shown


def test_labels_keep_their_distance_their_order_and_their_limits() -> None:
    rng = random.Random(0)
    for _ in range(300):
        wanted = [rng.uniform(10, 180) for _ in range(rng.randint(1, 6))]
        found = spread(wanted, 13, 10, 180)
        order = sorted(range(len(wanted)), key=lambda i: wanted[i])
        gaps = [found[b] - found[a] for a, b in itertools.pairwise(order)]
        assert all(gap >= 13 - 1e-9 for gap in gaps)
        assert min(found) >= 10 - 1e-9
        assert max(found) <= 180 + 1e-9
    assert spread([50, 100], 13, 0, 200) == [50, 100]
    assert spread([50, 52], 13, 0, 200) == [44.5, 57.5]


def test_a_thinned_line_keeps_its_ends_and_its_extremes() -> None:
    points = [(float(i), math.sin(i)) for i in range(10_000)]
    points[5_000] = (5_000.0, 99.0)
    kept = thinned(points, 100)
    assert len(kept) <= 100
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert points[5_000] in kept
    assert kept == sorted(kept)
    assert evenly(points, 80)[-1] == points[-1]
    assert len(evenly(points, 80)) == 80


def test_smoothing_keeps_a_level_and_does_not_lag() -> None:
    assert [y for _, y in smooth([(i, 2.0) for i in range(50)])] == pytest.approx([2.0] * 50)
    line = smooth([(float(i), float(i)) for i in range(1000)])
    assert line[500][1] == pytest.approx(500, abs=1)
    rng = random.Random(0)
    noisy = smooth([(float(i), rng.gauss(0, 1)) for i in range(1000)])
    assert max(abs(y) for _, y in noisy) < 0.8


def test_a_chart_tells_every_value_and_places_it_where_its_axis_says() -> None:
    points = [(20.0 * i, 3.0 + math.cos(i)) for i in range(21)]
    drawn = chart(
        "Loss", [Line("training", points)], [Level("unigram", 5.75)], Axis(log=False), x_range=(0, 0), note="nats"
    )
    tips = {one.text for one in elements(drawn, "title")}
    assert tips == {f"step {x:g}: training {y:.6g}" for x, y in points}
    (path,) = elements(drawn, "path")
    found = [tuple(map(float, pair.split(","))) for pair in (path.get("d") or "")[1:].split("L")]
    lines, texts = elements(drawn, "line", "grid"), elements(drawn, "text", "y")
    grid = [(float(line.get("y1") or 0), float(tick.text or 0)) for line, tick in zip(lines, texts)]
    (y0, v0), (y1, v1) = grid[0], grid[-1]
    for (_, y), (_, value) in zip(found, points):
        assert v0 + (y - y0) / (y1 - y0) * (v1 - v0) == pytest.approx(value, abs=0.005)
    assert all(LEFT <= x <= WIDTH and TOP <= y <= HEIGHT - BOTTOM for x, y in found)
    assert [one.text for one in elements(drawn, "text", "label")] == [f"training {points[-1][1]:.4g}", "unigram 5.75"]


def test_a_logarithmic_axis_where_values_span_decades() -> None:
    drawn = chart("x", [Line("a", [(1, 0.02), (2, 0.2), (3, 2.0)])])
    ys = [float(pair.split(",")[1]) for pair in (elements(drawn, "path")[0].get("d") or "")[1:].split("L")]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_of_many_points_some_are_told_the_last_among_them() -> None:
    points = [(float(i), float(i)) for i in range(5000)]
    told = elements(chart("x", [Line("a", points)]), "title")
    assert len(told) == MOST_TIPS
    assert told[-1].text == "step 4,999: a 4999"


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [1e99, -1e99], [1.0, 1.0 + 2e-16], [-1.0, 1.0], [1e-100, 1e99], [0.0, 1e-100]]
)
@pytest.mark.parametrize("axis", [Axis(), Axis(log=True), Axis(percent, zero=True, top=1.0)])
def test_whatever_the_values_there_is_a_chart_of_finite_places(values: list[float], axis: Axis) -> None:
    drawn = chart("x", [Line("a", list(enumerate(values)))], axis=axis)
    assert not re.search(r'="[^"]*(nan|inf)\b', drawn.split("aria-label")[0])
    assert all(math.isfinite(float(one.get("cy") or 0)) for one in elements(drawn, "circle"))
    ladder("x", [("a", value, "train") for value in values])


def test_nothing_to_draw_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="no points"):
        chart("x", [Line("a", [])])


def test_the_structure_of_a_small_chart() -> None:
    drawn = chart("A <b>", [Line("b&c", [(0, 1), (1, 2)])], axis=Axis(log=False), x_label="t")
    root = ET.fromstring(drawn)
    assert [one.tag for one in root] == ["figcaption", "svg"]
    assert root[0][0].text == "A <b>"
    kinds = [(one.tag, one.get("class")) for one in root[1]]
    assert kinds[-5:] == [
        ("path", "line train"), ("circle", "tip"), ("circle", "tip"), ("circle", "dot train"), ("text", "label train"),
    ]  # fmt: skip
    assert root[1].get("aria-label") == "A <b>: b&c from 1 at 0 to 2 at 1"
