"""What others say of the run: the diagnosis's go or no-go, and evaluations."""

import json

from pretrain.evaluate.tables import published, shown
from pretrain.report.charts import Axis, Level, Line, chart, grid, percent
from pretrain.report.files import Entry, Run, number
from pretrain.report.markup import Html, facts, join, missing, table, tag

WORDS = {True: "ok", False: "FAIL", None: ""}
CURVES = (
    ("Decoder's basin", "noise_levels", "accuracy_at_noise", "noise", (Level("bar", 0.9),), "tokens kept under noise"),
    ("One-step estimate", "estimate_times", "estimate_accuracy", "t", (), "tokens decoded from it"),
)
"""Of the diagnosis: title, its x and y, the name of x, levels, note."""


def chip(word: str, passed: bool | None) -> Html:
    """A word that is good or bad news, also for whoever sees no colours."""
    return tag("span", word, class_={True: "chip good", False: "chip bad", None: "chip"}[passed]) if word else Html("")


def signs(figure: str) -> str:
    """A figure or threshold with the signs that diagnosis.json writes in ASCII."""
    return figure.replace("+-", "±").replace("<=", "≤").replace(">=", "≥")


def verdict(run: Run, _: Run | None) -> Html:
    """The checks of diagnosis.json with their thresholds."""
    told = run.diagnosis
    if told is None:
        return missing(f"Not diagnosed yet: textldm diagnose --run {run.folder} asks whether the run is alive.")
    step = number(told.get("step"))
    rows = [
        (
            f"{check.get('check', '')} {check['name']}",
            signs(check["figure"]),
            signs(check["threshold"]),
            chip(WORDS[check["passed"]], check["passed"]),
        )
        for check in told["checks"]
    ]
    when = "" if step is None else f"Of the weights after {step:,.0f} steps. "
    note = f"{when}Four figures: the quarters of t, from data to noise. The checks are explained in docs/diagnosis.md."
    parts = [tag("p", note, class_="note"), table(("check", "figure", "threshold", "verdict"), rows, "checks")]
    charts = [
        chart(title, [Line("tokens", points, dots=True)], levels, Axis(percent, log=False, top=1.0), x_label, note=note)
        for title, xs, ys, x_label, levels, note in CURVES
        if (points := _pairs(told, xs, ys))
    ]
    return join([*parts, grid(charts)])


def _pairs(told: Entry, xs: str, ys: str) -> list[tuple[float, float]]:
    places, values = told.get(xs), told.get(ys)
    if not isinstance(places, list) or not isinstance(values, list):
        return []
    return [(x, y) for x, y in zip(map(number, places), map(number, values)) if x is not None and y is not None]


def evaluations(run: Run, _: Run | None) -> Html:
    """A table a benchmark: a row a figure, a column a model; below, the sweeps over the sampling's settings."""
    if not run.evaluations and not run.sweeps:
        how = f"textldm evaluate --model EXPORT --benchmark wikipedia --output {run.folder}/wikipedia.json"
        return missing(f"None in the run's folder: {how} puts one there; --evaluation FILE names others.")
    parts = []
    for benchmark in dict.fromkeys(result["benchmark"] for result in run.evaluations):
        group = [result for result in run.evaluations if result["benchmark"] == benchmark]
        papers = published(group[0])
        names = dict.fromkeys(name for result in group for name in result["metrics"])
        rows = [
            (
                name.replace("_", " "),
                *(_cell(result, name) for result in group),
                *(values.get(name, "") for _, values in papers),
            )
            for name in names
        ]
        models = [result["model"] for result in group] + [f"{model}, the paper's" for model, _ in papers]
        parts += [tag("h3", benchmark), _protocol(group[0]), table(("figure", *models), rows, "figures")]
        for result in group:
            for name, why in result["left_out"].items() if isinstance(result["left_out"], dict) else ():
                parts.append(missing(f"{result['model']}: {name} left out ({why})"))
    return join([*parts, *map(sweep, run.sweeps)])


def sweep(told: Entry) -> Html:
    """A figure against its cost, and the settings that none of the same or a lower cost beats."""
    by, points = told["by"], told["points"]
    name = by.replace("_", " ")
    places = [(point["evaluations"], number(point["metrics"][by]["value"])) for point in points]
    best = [places[i] for i in told["pareto"]]
    lines = [Line("tried", [(x, y)], dots=True, faint=True, tips=True) for x, y in places if y is not None]
    lines.append(Line("Pareto set", [(x, y) for x, y in best if y is not None], dots=True))
    settings = list(points[0]["settings"])
    rows = [
        (*(str(points[i]["settings"].get(key, "")) for key in settings), f"{places[i][0]:g}", _cell(points[i], by))
        for i in told["pareto"]
    ]
    drawn = [chart(name, lines, x_label="network evaluations a text")] if lines[-1].points else []
    title = tag("h3", f"Settings of sampling, {told['benchmark']}")
    heads = (*(key.replace("_", " ") for key in settings), "evaluations", name)
    return join([title, grid(drawn), table(heads, rows, "Pareto set")])


def _cell(result: Entry, name: str) -> Html:
    found = result["metrics"].get(name)
    if found is None:
        return Html("")
    value, _, interval = shown(name, found).partition(" ")
    return join([tag("data", value, value=json.dumps(found["value"])), tag("small", interval) if interval else ""])


def _protocol(result: Entry) -> Html:
    protocol = result["protocol"]
    told = [("documents", protocol["samples"])]
    told += [(name.replace("_", " "), protocol[name]) for name in ("seed", "max_words", "judge") if name in protocol]
    for name in ("mauve", "bertscore"):
        if isinstance(protocol.get(name), dict) and "model" in protocol[name]:
            told.append((f"{name}'s model", protocol[name]["model"]))
    return facts(told)
