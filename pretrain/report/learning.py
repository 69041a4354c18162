"""How the run learned: nats per token beside what it is measured against, losses, the learning rate."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.report.charts import Axis, Level, Line, Point, chart, grid, ladder, percent, smooth
from pretrain.report.files import Entry, Metrics, Run, number
from pretrain.report.markup import Html, facts, figure, join, missing, tag, text

HOUSEKEEPING = {"kind", "step", "time", "seconds", "stragglers", "skipped", "nats_t0"}
RUNNING = {"step_s", "tokens_per_s", "tokens_per_s_per_device", "wait_share", "peak_memory_gib", "goodput", "mfu"}
"""Measures of `running.py`."""
NATS = {"nats", "nats_per_token", "unigram_nats"}
BOUNDED = ("dit", "distill", "mdlm")
"""Stages whose nats a token are an upper bound."""
NO_NATS = {
    "vae": "Stage vae gives no probability to text; what of it is given back is under Losses.",
    "distill": "Stage distill says where its teacher's steps lead, not what text is likely; how near it comes is under Losses.",
}
FEW = 40
"""Points below which a line is not smoothed."""

SHARE = Axis(percent, log=False)
NATS_AXIS = Axis("{:.3f}".format, log=False)
RATE = Axis("{:.2g}".format, log=False, zero=True)
MEASURES: dict[str, tuple[str, str, Axis]] = {
    "loss": ("Training loss", "as it is minimised", Axis(log=False)),
    "flow": ("Flow loss", "per channel, over all t", Axis(log=False)),
    "distill": ("Error of a step", "its teacher's guided steps being right", Axis(log=False)),
    "distilled": ("Share gone of that error", "of the teacher's own unguided step's", SHARE),
    "token_ce": ("Cross-entropy of the token head", "nats, over all t", Axis(log=False)),
    "ce": ("Reconstruction", "cross-entropy, nats a token", Axis()),
    "token_accuracy": ("Tokens given back", "", SHARE),
    "kl_per_token": ("KL", "nats a token", Axis()),
    "repa_cosine": ("REPA cosine", "with the teacher's features", Axis(log=False)),
    "repa_cosine_excess": ("REPA cosine above shuffled pairs", "", Axis(log=False)),
    "mean_square": ("Mean square of the latents' means", "", Axis(log=False)),
    "posterior_variance": ("Variance of the posterior", "", Axis(log=False)),
    "grad_norm": ("Gradient norm", "before clipping", Axis()),
    "lr": ("Learning rate", "", RATE),
}
"""Title, note and axis by name, in the order of the page; others follow under their own names."""
QUARTERS = ("t below ¼", "t from ¼ to ½", "t from ½ to ¾", "t above ¾")
FLOORS = {"blind_floor": "blind", "covariance_floor": "covariance"}


def series(lines: Sequence[Entry], name: str) -> list[Point]:
    """Steps and values of a metric, where it is logged and finite."""
    found = ((line["step"], number(line.get(name))) for line in lines)
    return [(float(step), value) for step, value in found if value is not None]


def measured(metrics: Metrics) -> list[str]:
    """Names of everything that was measured, in the page's order."""
    lines = (*metrics.train, *metrics.eval)
    names = dict.fromkeys(
        name.removeprefix("eval/") for line in lines for name in line if number(line[name]) is not None
    )
    known = [name for name in MEASURES if name in names]
    return known + [name for name in names if name not in MEASURES and name not in HOUSEKEEPING]


def lines_of(metrics: Metrics, name: str, other: Metrics | None = None) -> list[Line]:
    """A metric's lines: as trained on, smoothed where there are enough points, held out; and the other run's."""
    train, held_out = series(metrics.train, name), series(metrics.eval, f"eval/{name}")
    level = name in ("lr", *RUNNING)
    found = []
    if level or len(train) < FEW:
        found.append(Line("training", train))
    else:
        found += [Line("as logged", train, faint=True), Line("smoothed", smooth(train), tips=False)]
    found.append(Line("held-out", held_out, "heldout", dots=True))
    if other:
        theirs = series(other.eval, f"eval/{name}") if held_out else series(other.train, name)
        found.append(Line("other", theirs if held_out or level or len(theirs) < FEW else smooth(theirs), "against"))
    return [line for line in found if line.points]


def measure(run: Run, name: str, against: Run | None = None, metrics: Metrics | None = None) -> Html:
    """A metric's chart over the steps."""
    title, note, axis = MEASURES.get(name, (name.replace("_", " "), "", Axis()))
    lines = lines_of(metrics or run.metrics, name, against.metrics if against else None)
    return chart(title, lines, axis=axis, x_range=(0, 0), note=note)


def losses(run: Run, against: Run | None) -> Html:
    """All that was measured over the steps but nats and speed."""
    names = [name for name in measured(run.metrics) if name not in NATS | RUNNING and not re.search(r"_q\d+$", name)]
    if not names:
        return missing("No step has been logged yet: metrics.jsonl is not there or has no lines of training.")
    parts = [grid([measure(run, name, against) for name in names])]
    if found := list(quarters(run.metrics)):
        told = "By quarter of t, from nearly clean (left) to nearly noise; the floors are predictors that know no language."
        parts += [tag("p", told, class_="note"), grid(found)]
    return join(parts)


def quarters(metrics: Metrics) -> Iterator[Html]:
    """Charts of what is measured by quarter of t, with its floors."""
    for base in dict.fromkeys(name[:-3] for name in measured(metrics) if re.search(r"_q[1-4]$", name)):
        if base in FLOORS:
            continue
        for quarter, title in enumerate(QUARTERS, 1):
            lines = lines_of(metrics, f"{base}_q{quarter}")
            where, prefix = (
                (metrics.eval, "eval/") if series(metrics.eval, f"eval/{base}_q{quarter}") else (metrics.train, "")
            )
            levels = []
            for name, label in FLOORS.items() if base == "flow" else ():
                if values := series(where, f"{prefix}{name}_q{quarter}"):
                    levels.append(Level(label, sum(value for _, value in values) / len(values)))
            if lines:
                yield chart(
                    f"{base.replace('_', ' ').capitalize()} loss, {title}",
                    lines,
                    levels,
                    Axis(log=False),
                    x_range=(0, 0),
                )


def last(points: Sequence[Point]) -> float | None:
    """The value of the last step."""
    return points[-1][1] if points else None


def nats_of(run: Run) -> dict[str, float | None]:
    """Nats per token of the model and of what it is measured against: of the diagnosis, else of the last held-out evaluation."""
    told, held_out = run.diagnosis or {}, run.metrics.eval
    logged = last(series(held_out, "eval/nats") or series(held_out, "eval/nats_per_token"))
    model = number(told.get("nats_per_token"))
    unigram = number(told.get("unigram_nats"))
    return {
        "model": logged if model is None else model,
        "error": number(told.get("nats_per_token_error")),
        "unigram": last(series(held_out, "eval/unigram_nats")) if unigram is None else unigram,
        "teacher": number(told.get("teacher_nats")),
        "context": number(told.get("context_nats")),
        "context_error": number(told.get("context_nats_error")),
    }


def with_error(value: float, error: float | None, form: str) -> Html:
    """A figure and its standard error."""
    return join([figure(value, form), *([" ± ", figure(error, form)] if error is not None else [])])


def nats(run: Run, against: Run | None) -> Html:
    """Nats per token over the steps, over t0, and on one line with what it is measured against."""
    found, other = nats_of(run), nats_of(against) if against else {}
    if found["model"] is None:
        if run.stage in NO_NATS:
            return missing(NO_NATS[run.stage])
        how = f"textldm diagnose --run {run.folder} does it, and so does training every train.eval_every steps."
        own = lines_of(run.metrics, "nats_per_token", against.metrics if against else None)
        title, note = "On the training rows", "nats per token"
        drawn = [chart(title, own, (), NATS_AXIS, x_range=(0, 0), note=note)] if own else []
        return join([missing(f"Not measured on held-out text yet: {how}"), grid(drawn)])
    levels = [Level(name, value, name) for name in ("unigram", "teacher") if (value := found[name]) is not None]
    marks = [("this run", found["model"], "train"), *((level.label, level.value, level.role) for level in levels)]
    if (theirs := other.get("model")) is not None:
        marks.append(("other", theirs, "against"))
    charts = [ladder("Nats per token", marks, "lower is better")]
    name = "nats" if series(run.metrics.eval, "eval/nats") else "nats_per_token"
    lines = lines_of(run.metrics, name)
    if against:
        theirs_at = series(against.metrics.eval, "eval/nats") or series(against.metrics.eval, "eval/nats_per_token")
        lines.append(Line("other", theirs_at, "against", dots=True))
    if any(line.points for line in lines):
        charts.append(
            chart(
                "Over the steps",
                lines,
                levels,
                NATS_AXIS,
                x_range=(0, 0),
                note="nats" if is_exact(run) else "bound, nats",
            )
        )
    charts += _over_times(run.diagnosis or {}, levels)
    return join([facts(_nats_facts(found, is_exact(run))), grid(charts)])


def is_exact(run: Run) -> bool:
    """Whether the stage's nats a token are no bound."""
    return run.stage not in BOUNDED


def _nats_facts(found: Mapping[str, float | None], exact: bool) -> list[tuple[str, Any]]:
    model, unigram, teacher = (found[name] for name in ("model", "unigram", "teacher"))
    assert model is not None
    shown: list[tuple[str, Any]] = [
        ("nats per token" if exact else "nats per token, at most", with_error(model, found["error"], ".3f"))
    ]
    if unigram is not None:
        shown.append(("unigram: how often each token occurs", figure(unigram, ".3f")))
    if teacher is not None:
        shown.append(("teacher, word by word (exact)", figure(teacher, ".3f")))
        if unigram is not None and unigram > teacher:
            shown.append(("of the way from unigram to teacher", text(percent((unigram - model) / (unigram - teacher)))))
    if (context := found["context"]) is not None:
        shown.append(("what the context is worth", with_error(context, found["context_error"], ".3f")))
    return shown


def _over_times(told: Entry, levels: Sequence[Level]) -> list[Html]:
    times, values = told.get("nats_times"), told.get("nats_curve")
    if not isinstance(times, list) or not isinstance(values, list):
        return []
    points = [(t, v) for t, v in zip(map(number, times), map(number, values)) if t is not None and v is not None]
    if not points:
        return []
    lines = [Line("bound", points, dots=True)]
    return [chart("Over t₀", lines, levels, NATS_AXIS, x_label="t₀", note="where the flow's share begins")]
