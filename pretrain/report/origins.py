"""What the run was made from: its configuration, its data, the VAE beneath."""

import itertools
from typing import Any

from pretrain.report.charts import grid
from pretrain.report.files import Run, flat
from pretrain.report.learning import NATS, RUNNING, measure, measured
from pretrain.report.markup import Html, facts, figure, join, missing, table, tag


def data(run: Run, _: Run | None) -> Html:
    """The manifest's figures."""
    manifest = run.data
    if manifest is None:
        return missing(run.data_note)
    shown: list[tuple[str, Any]] = [
        ("source", manifest.source),
        ("tokenizer", f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} tokens"),
        ("row", f"{manifest.row_tokens:,} tokens"),
        ("windows", f"{manifest.min_window:,} to {manifest.max_window:,} tokens"),
        ("held out", f"{100 * manifest.heldout_fraction:g}% of the documents"),
        ("fingerprint", tag("code", manifest.fingerprint[:16])),
    ]
    seen = tokens_seen(run)
    total = sum(shard.tokens for shard in manifest.splits.get("train", []))
    if seen and total:
        shown.append(("passes over it so far", figure(seen / total, ".3g")))
    rows = []
    for split, shards in manifest.splits.items():
        counts = [sum(getattr(shard, name) for shard in shards) for name in ("rows", "windows", "tokens", "bytes")]
        rows.append(
            (split, f"{len(shards):,}", *(figure(count, ",") for count in counts), f"{100 * manifest.fill(split):.1f}%")
        )
    told = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.statistics.items())
    return join(
        [
            facts(shown),
            table(("split", "shards", "rows", "windows", "tokens", "bytes", "fill"), rows, "numbers"),
            tag("p", f"Of the preparation: {told}.", class_="note") if told else "",
        ]
    )


def tokens_seen(run: Run) -> int | None:
    """Tokens of all rows up to the last step."""
    rows = run.setting("data.rows_per_step")
    return run.step * rows * run.data.row_tokens if run.data and isinstance(rows, int) and 0 < rows < 1 << 40 else None


def configuration(run: Run, against: Run | None) -> Html:
    """All keys, and with another run those that differ, first."""
    keys = flat(run.config)
    parts = []
    if against:
        theirs = flat(against.config)
        changed = [
            (key, keys.get(key, "not there"), theirs.get(key, "not there"))
            for key in dict.fromkeys([*keys, *theirs])
            if keys.get(key) != theirs.get(key) and not key.startswith("about.")
        ]
        title = f"Differences from {against.folder}"
        parts.append(tag("h3", title))
        parts.append(table(("key", "this run", "other"), changed, "keys") if changed else missing("None."))
    about = run.setting("about")
    if isinstance(about, dict):
        parts += [tag("p", tag("b", f"{name.capitalize()}. "), value) for name, value in about.items() if value]
    rest = [(key, value) for key, value in keys.items() if not key.startswith("about.") and key != "stage"]
    for section, group in itertools.groupby(rest, key=lambda pair: pair[0].partition(".")[0]):
        rows = [(key.partition(".")[2] or key, value) for key, value in group]
        parts.append(tag("details", tag("summary", section), table(("key", "value"), rows, "keys")))
    return join(parts)


def beneath(run: Run, _: Run | None) -> Html:
    """How the VAE was trained, whose latents a DiT models."""
    if run.vae is None:
        return missing(run.vae_note)
    names = [
        name for name in measured(run.vae) if name not in NATS | RUNNING and name not in ("lr", "grad_norm", "loss")
    ]
    return grid([measure(run, name, metrics=run.vae) for name in names]) if names else missing("Its log is empty.")
