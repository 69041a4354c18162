"""How the run ran: throughput, waits, goodput, starts and checkpoints."""

import datetime
import statistics
from typing import Any

from pretrain.report.charts import Axis, chart, grid, percent
from pretrain.report.files import Entry, Run, number
from pretrain.report.learning import last, lines_of, series
from pretrain.report.markup import Html, facts, figure, join, missing, table, tag, text
from pretrain.telemetry.sinks import duration

SPEEDS: dict[str, tuple[str, str, Axis]] = {
    "tokens_per_s": ("Throughput", "tokens a second, all devices", Axis("{:,.0f}".format, log=False, zero=True)),
    "mfu": ("MFU", "of the devices' peak", Axis(percent, log=False, zero=True)),
    "wait_share": ("Waiting for data", "below 1% is healthy", Axis(percent, log=False, zero=True, top=0.01)),
    "goodput": ("Goodput", "of all wall time since the first start", Axis(percent, log=False, zero=True, top=1.0)),
    "peak_memory_gib": ("Peak memory", "GiB, the largest rank's", Axis("{:.3g}".format, log=False, zero=True)),
}
MOST_EVENTS = 40


def throughput(run: Run, against: Run | None) -> Html:
    """Facts, charts, and what happened when."""
    metrics = run.metrics
    if not metrics.train:
        return missing("No step has been logged yet.")
    charts = [
        chart(title, lines, axis=axis, x_range=(0, 0), note=note)
        for name, (title, note, axis) in SPEEDS.items()
        if (lines := lines_of(metrics, name, against.metrics if against else None))
    ]
    return join([facts(_facts(run)), grid(charts), _events(metrics.events)])


def _facts(run: Run) -> list[tuple[str, Any]]:
    lines, events = run.metrics.train, run.metrics.events
    speeds, waits = ([value for _, value in series(lines, name)] for name in ("tokens_per_s", "wait_share"))
    shown: list[tuple[str, Any]] = []
    if speeds:
        shown.append(("tokens a second, median", figure(statistics.median(speeds), ",.0f")))
    per_device = [value for _, value in series(lines, "tokens_per_s_per_device")]
    if per_device:
        shown.append(("on each device", figure(statistics.median(per_device), ",.0f")))
    if waits:
        shown.append(("waiting for data, mean", text(percent(statistics.fmean(waits)))))
    for name, title in (("goodput", "goodput"), ("mfu", "MFU")):
        if (value := last(series(lines, name))) is not None:
            shown.append((title, text(percent(value))))
    if (seconds := wall_seconds(run)) is not None:
        shown.append(("from first start to last line", duration(seconds)))
    starts = sum(event.get("event") == "start" for event in events)
    shown.append(("starts", starts))
    saves = [event for event in events if event.get("event") == "checkpoint"]
    stalls = [stall for event in saves if (stall := number(event.get("stalled_s"))) is not None]
    shown.append(("checkpoints", len(saves)))
    if stalls:
        shown.append(("training waited for them", text(f"{sum(stalls):.3g} s")))
    skipped = sum(value for _, value in series(lines, "skipped"))
    shown.append(("skipped steps", figure(skipped, ".0f")))
    return shown


def wall_seconds(run: Run) -> float | None:
    """From the first line of metrics.jsonl to the last."""
    metrics = run.metrics
    times = [
        time
        for line in (*metrics.train, *metrics.eval, *metrics.events)
        if (time := number(line.get("time"))) is not None
    ]
    return max(times) - min(times) if len(times) > 1 else None


def moment(seconds: float | None) -> str:
    """A time since 1970 as date and time, UTC; whatever is none is empty."""
    try:
        return "" if seconds is None else f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return ""


def _events(events: list[Entry]) -> Html:
    shown = [event for event in events if event.get("event") != "checkpoint"]
    if not shown:
        return Html("")
    rows = []
    for event in shown[-MOST_EVENTS:]:
        rest = ", ".join(
            f"{name} {value}" for name, value in event.items() if name not in ("kind", "event", "step", "time")
        )
        rows.append((event.get("event"), f"{event['step']:,}", moment(number(event.get("time"))), rest))
    title = "Starts, skipped steps and ends" + (
        f", the last {MOST_EVENTS} of {len(shown)}" if len(shown) > len(rows) else ""
    )
    return tag("details", tag("summary", title), table(("event", "step", "time, UTC", "with"), rows))
