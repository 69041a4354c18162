"""Looking at a prepared folder: its summary, histograms, and sample rows as text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tabulate import tabulate

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.tokenization import load_prepared_tokenizer

_BAR = 40  # characters of a histogram's longest
_ROWS = 2
_SHARDS = 16


def inspect(folder: Path) -> Iterator[str]:
    """Lines that describe the folder; histograms are over the first train shards."""
    manifest = Manifest.load(folder)
    yield from _summary(manifest, folder)
    rows = TokenRows(str(folder), manifest, "train", verify=False)
    spans = [Span(0, i, 0, shard.rows) for i, shard in enumerate(manifest.splits["train"][:_SHARDS])]
    lengths = [windows for span in spans for windows in rows.read(span)[1]]
    contexts = [found for span in spans if (found := rows.read_flat(span).contexts_W) is not None]
    yield ""
    yield from _histogram("window length (tokens)", np.concatenate(lengths), manifest.max_window)
    if contexts:
        yield from _histogram("context length (tokens)", np.concatenate(contexts), manifest.max_window)
    fill = np.array([100 * windows.sum() / manifest.row_tokens for windows in lengths])
    yield from _histogram("row fill (%)", fill, 100)
    tokenizer = load_prepared_tokenizer(str(folder), manifest.tokenizer).backend

    def shown(tokens: np.ndarray) -> str:
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        return f"{text[:160]!r}{'...' if len(text) > 160 else ''}"

    first = rows.read_flat(Span(0, 0, 0, min(_ROWS, spans[0].stop)))
    window = 0
    for row, (tokens, count) in enumerate(zip(first.tokens_BR, first.counts_B.tolist())):
        yield f"\nrow {row} of {manifest.splits['train'][0].name}: {count} windows"
        start = 0
        for length in first.lengths_W[window : window + count].tolist():
            context = 0 if first.contexts_W is None else int(first.contexts_W[window])
            before = "" if first.contexts_W is None else f"{shown(tokens[start : start + context])} -> "
            yield f"  [{length:5d}] {before}{shown(tokens[start + context : start + length])}"
            start, window = start + length, window + 1


def _summary(manifest: Manifest, folder: Path) -> Iterator[str]:
    yield f"{folder}: {manifest.source}, fingerprint {manifest.fingerprint[:16]}"
    tokenizer = manifest.tokenizer
    revision = f"@{tokenizer.revision[:12]}" if tokenizer.revision else ""
    yield (
        f"tokenizer {tokenizer.name}{revision}, {tokenizer.vocab_size} tokens, document end {tokenizer.eos_id}, "
        f"sha256 {tokenizer.sha256[:16]}"
    )
    windows_range = f"{manifest.min_window} to {manifest.max_window}"
    fill = f"fill {100 * manifest.fill():.2f} %"
    yield f"rows of {manifest.row_tokens} tokens ({manifest.token_dtype}), windows of {windows_range}, {fill}"
    if manifest.pairs:
        yield (
            f"each window a context of field {manifest.pairs.context_field!r} and a target of field {manifest.pairs.target_field!r}, "
            "for data.split.kind=data"
        )
    yield ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in manifest.statistics.items())
    rows = []
    for split, shards in manifest.splits.items():
        sums = [sum(getattr(shard, name) for shard in shards) for name in ("rows", "windows", "tokens")]
        size = sum(shard.bytes for shard in shards) / 1e6
        counts = (f"{count:,}" for count in (len(shards), *sums))
        rows.append((split, *counts, f"{size:,.1f}", f"{100 * manifest.fill(split):.2f}"))
    headers = ("split", "shards", "rows", "windows", "tokens", "MB", "fill %")
    yield tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=("left", *["right"] * 6))


def _histogram(title: str, values: np.ndarray, top: float) -> Iterator[str]:
    counts, edges = np.histogram(values, bins=10, range=(0, top))
    yield (
        f"{title}: mean {values.mean():.1f}, median {np.median(values):.1f}, "
        f"smallest {values.min():.1f}, largest {values.max():.1f}"
    )
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = "#" * round(_BAR * count / counts.max())
        yield f"  {low:7.0f} to {high:7.0f} {100 * count / len(values):6.2f} % {bar}"
