"""What the run writes: texts at its milestones, and one text on its way from noise."""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from pretrain.report.files import Entry, Run
from pretrain.report.markup import Html, join, missing, tag

PROMPTS, MILESTONES = 6, 6
"""At most so many texts, and so many of a text's stages."""
FLOWS = ("dit", "distill")
"""Stages whose texts come out of noise."""
BESIDES = ("kind", "step", "time")
LONGEST, LONGEST_FRAME, MOST_FRAMES = 4000, 2400, 64
"""Characters of a text, and of one on its way; and at most so many t of that."""


def samples(run: Run, _: Run | None) -> Html:
    """A text a block: its context, what the model made of it at each milestone, and the true continuation."""
    entries = run.metrics.samples
    where = ""
    if not entries and isinstance((run.diagnosis or {}).get("samples"), list):
        assert run.diagnosis is not None
        entries = [entry for entry in run.diagnosis["samples"] if isinstance(entry, dict)]
        where = "From the diagnosis."
    if not entries:
        return missing(
            "No texts in metrics.jsonl: train.eval_samples is how many a held-out evaluation writes, of stages that write any."
        )
    groups: dict[str, list[Entry]] = {}
    for number, entry in enumerate(entries):
        groups.setdefault(str(entry.get("context", number)), []).append(entry)
    parts = [tag("p", where, class_="note")] if where else []
    if len(groups) > PROMPTS:
        parts.append(tag("p", f"The first {PROMPTS} of {len(groups)} texts.", class_="note"))
    return join([*parts, *map(_text, list(groups.values())[:PROMPTS])])


def _text(entries: Sequence[Entry]) -> Html:
    chosen = spaced(entries, MILESTONES)
    rows = []
    if "context" in chosen[0]:
        rows.append(_row("context", chosen[0]["context"], "given"))
    for entry in chosen:
        for name, value in entry.items():
            if name not in (*BESIDES, "context", "true"):
                step = f"{name}, step {entry['step']:,}" if isinstance(entry.get("step"), int) else name
                rows.append(_row(step, value, "made"))
    if "true" in chosen[0]:
        rows.append(_row("true", chosen[0]["true"], "given"))
    if len(chosen) < len(entries):
        rows.append(tag("p", f"{len(chosen)} of {len(entries)} milestones.", class_="note"))
    return tag("article", *rows)


def _row(name: str, value: object, class_: str) -> Html:
    shown = str(value).strip()
    shown = shown if len(shown) <= LONGEST else f"{shown[:LONGEST]} …"
    return tag("div", tag("h4", name), tag("p", shown, dir="auto"), class_=class_)


def spaced(entries: Sequence[Any], most: int) -> list[Any]:
    """At most so many, the first and the last among them."""
    if len(entries) <= most:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (most - 1))] for i in range(most)]


def settled_words(text: str, final: str) -> list[tuple[str, bool]]:
    """The text's words and spaces, each with whether it is part of the final text, in the same order."""
    own, last = (re.findall(r"\s+|\S+", one) for one in (text, final))
    settled = [False] * len(own)
    for block in difflib.SequenceMatcher(None, own, last, autojunk=False).get_matching_blocks():
        settled[block.a : block.a + block.size] = [True] * block.size
    return list(zip(own, settled))


def runs_of(words: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of one kind as one text."""
    found: list[tuple[str, bool]] = []
    for word, settled in words:
        if found and (found[-1][1] == settled or word.isspace()):
            found[-1] = (found[-1][0] + word, found[-1][1])
        else:
            found.append((word, settled))
    return found


def denoising(run: Run, _: Run | None) -> Html:
    """The text at every t. page.js puts a slider in front, and shows one at a time; without it, and on paper, all of them stand there."""
    if run.trajectory is None and run.stage not in FLOWS:
        return missing(f"Stage {run.stage} does not write by taking noise away.")
    if run.trajectory is None:
        how = f"textldm generate --model EXPORT --prompt ... --trajectory {run.folder}/trajectory.json"
        return missing(f"No trajectory.json: {how} writes it; --trajectory FILE names another.")
    final = run.trajectory[-1][1][:LONGEST_FRAME]
    frames = []
    for t, text in spaced(run.trajectory, MOST_FRAMES):
        pieces = runs_of(settled_words(text[:LONGEST_FRAME].strip(), final))
        words = [piece if settled else tag("i", piece) for piece, settled in pieces]
        frames.append(tag("div", tag("h4", f"t = {t:.2f}"), tag("p", *words, dir="auto"), class_="frame"))
    slider = tag(
        "input", type="range", id="time", min=0, max=len(frames) - 1, value=0, aria_label="t, from noise to text"
    )
    ends = tag("div", tag("span", "noise"), slider, tag("span", "text"), id="way", hidden=True)
    note = tag("p", "Dark: words that stay to the end.", class_="note")
    return join([note, ends, tag("div", *frames, id="frames")])
