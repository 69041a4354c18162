"""The page: its head, its sections in their order, and the promise that it asks nothing of anybody.

One file: styles and script stand in it, and its Content-Security-Policy allows these two by their hashes and nothing else, so that no text
in it can load or run anything, whatever it holds.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from importlib.resources import files as resources
from typing import Any

from pretrain.report import judging, learning, origins, running, texts
from pretrain.report.charts import percent
from pretrain.report.files import Run
from pretrain.report.markup import Html, compact, facts, figure, join, missing, tag, text

Section = tuple[str, str, str, Callable[[Run, Run | None], Html]]
"""Anchor, its name in the navigation, title, content."""

SECTIONS: Sequence[Section] = (
    ("nats", "Nats", "Nats per token", learning.nats),
    ("verdict", "Verdict", "Go or no-go", judging.verdict),
    ("losses", "Losses", "Losses and learning rate", learning.losses),
    ("samples", "Samples", "What it writes", texts.samples),
    ("denoising", "Denoising", "One text out of noise", texts.denoising),
    ("evaluations", "Evaluations", "Evaluations", judging.evaluations),
    ("throughput", "Throughput", "Throughput", running.throughput),
    ("data", "Data", "Data", origins.data),
    ("vae", "VAE", "The VAE beneath", origins.beneath),
    ("configuration", "Configuration", "Configuration", origins.configuration),
)


def page(run: Run, against: Run | None = None) -> str:
    """The whole page as text."""
    folder = resources("pretrain.report") / "page"
    style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    sections = [section for section in SECTIONS if section[0] != "vae" or run.setting("model.vae") is not None]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{run.folder}: TextLDM run"),
        tag("style", Html(style)),
    )
    links = join([tag("a", short, href=f"#{name}") for name, short, _, _ in sections])
    body = tag(
        "body",
        header(run, against),
        tag("nav", links, aria_label="sections"),
        tag(
            "main",
            *(tag("section", tag("h2", title), make(run, against), id=name) for name, _, title, make in sections),
        ),
        tag("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def breakable(path: str) -> Html:
    """A path that a narrow line breaks behind a slash."""
    return join([text(part) for part in path.split("/")], Html("/<wbr>"))


def header(run: Run, against: Run | None) -> Html:
    """Which run this is, how far it is, and the few figures that matter."""
    verdict = str((run.diagnosis or {}).get("verdict", "not diagnosed"))
    passed = {"go": True, "no-go": False}.get(verdict)
    steps = run.setting("train.steps")
    of = f" of {steps:,}" if isinstance(steps, int) else ""
    what = "light or dark"
    theme = tag("button", "◐", id="theme", type="button", title=what, aria_label=what, hidden=True)
    lines = [
        tag("div", tag("h1", breakable(str(run.folder))), theme, class_="top"),
        tag(
            "p",
            "Stage ",
            tag("b", run.stage),
            f", step {run.step:,}{of} ",
            judging.chip(verdict, passed),
            class_="lede",
        ),
        facts(_facts(run)),
    ]
    if against:
        told = f" {against.folder}: stage {against.stage}, step {against.step:,}"
        lines.append(tag("p", tag("span", "other", class_="key against"), told, class_="note"))
    if run.metrics.torn:
        lines.append(missing(f"Lines of metrics.jsonl that a kill tore, left out here: {run.metrics.torn}."))
    return tag("header", *lines)


def _facts(run: Run) -> list[tuple[str, Any]]:
    nats = learning.nats_of(run)
    shown: list[tuple[str, Any]] = []
    if nats["model"] is not None:
        shown.append(("nats per token", learning.with_error(nats["model"], nats["error"], ".3f")))
        if nats["unigram"] is not None:
            shown.append(("unigram", figure(nats["unigram"], ".3f")))
    accuracy = learning.last(learning.series(run.metrics.eval, "eval/token_accuracy"))
    if accuracy is not None:
        shown.append(("tokens given back", tag("data", percent(accuracy), value=repr(accuracy))))
    if run.checkpoint:
        count = sum(math.prod(parameter.shape) for parameter in run.checkpoint.parameters.values())
        shown.append(("parameters", tag("data", compact(count), value=count)))
    if seen := origins.tokens_seen(run):
        shown.append(("tokens seen", tag("data", compact(seen), value=seen)))
    if (seconds := running.wall_seconds(run)) is not None:
        shown.append(("wall time", running.duration(seconds)))
    if run.checkpoint:
        ranks = f"{run.checkpoint.world_size} × {run.checkpoint.precision}, ZeRO {run.checkpoint.zero_stage}"
        shown.append(("ranks", ranks))
        if isinstance(commit := run.checkpoint.extra.get("commit"), str) and commit:
            shown.append(("commit", commit))
        shown.append(("versions", ", ".join(f"{name} {version}" for name, version in run.checkpoint.versions.items())))
    return shown
