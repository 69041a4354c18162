"""Looking at a prepared folder: its summary, sample rows as text, histograms, and a check of every hash and every
row.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tabulate import tabulate

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest, ShardInfo
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.tokenization import load_tokenizer

_BAR = 40


def inspect(folder: Path, num_rows: int = 2, max_shards: int = 16) -> Iterator[str]:
    """Lines that describe the folder; histograms are over the first `max_shards` train shards."""
    manifest = Manifest.load(folder)
    yield from _summary(manifest, folder)
    rows = TokenRows(str(folder), manifest, "train", verify=False)
    spans = [Span(0, i, 0, shard.rows) for i, shard in enumerate(manifest.splits["train"][:max_shards])]
    lengths = [windows for span in spans for windows in rows.read(span)[1]]
    yield ""
    yield from _histogram("window length (tokens)", np.concatenate(lengths), manifest.max_window)
    fill = np.array([100 * windows.sum() / manifest.row_tokens for windows in lengths])
    yield from _histogram("row fill (%)", fill, 100)
    tokenizer = load_tokenizer(folder / "tokenizer").backend
    tokens, windows = rows.read(Span(0, 0, 0, min(num_rows, spans[0].stop)))
    for row in range(len(tokens)):
        yield f"\nrow {row} of {manifest.splits['train'][0].name}: {len(windows[row])} windows"
        for start, length in zip(np.cumsum(windows[row]) - windows[row], windows[row]):
            text = tokenizer.decode(tokens[row, start : start + length].tolist(), skip_special_tokens=False)
            yield f"  [{length:5d}] {text[:160]!r}{'...' if len(text) > 160 else ''}"


def verify(folder: Path, workers: int = 4) -> Iterator[str]:
    """Check every shard: size, hash, format, window lengths, counts, token ids, empty tails; and that tokenizer and
    shards are those of the manifest. Raises UserError at the first deviation.
    """
    manifest = Manifest.load(folder)
    _verify_tokenizer(folder, manifest)
    _verify_names(folder, manifest)
    for split, shards in manifest.splits.items():
        rows = TokenRows(str(folder), manifest, split, verify=True, capacity=2 * workers)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda item, rows=rows: _verify_shard(folder, manifest, rows, *item), enumerate(shards)))
        yield f"{split}: {len(shards)} shards, {sum(shard.rows for shard in shards)} rows: all as the manifest says"


def _verify_tokenizer(folder: Path, manifest: Manifest) -> None:
    found, expected = load_tokenizer(folder / "tokenizer").info, manifest.tokenizer
    for name in ("sha256", "vocab_size", "eos_id"):
        if getattr(found, name) != getattr(expected, name):
            raise UserError(
                f"{folder}/tokenizer/tokenizer.json has the {name} {getattr(found, name)}, the manifest says "
                f"{getattr(expected, name)}: copy the folder again, or prepare the data again"
            )


def _verify_names(folder: Path, manifest: Manifest) -> None:
    """A shard that no manifest names is the trace of another manifest."""
    named = {shard.name for shards in manifest.splits.values() for shard in shards}
    strange = sorted({path.name for split in manifest.splits for path in folder.glob(f"{split}-*.tar")} - named)
    if strange:
        raise UserError(
            f"{folder / strange[0]}: the manifest names no such shard ({len(strange)} such files): if it is no part "
            "of this data, delete it; else copy the manifest again, or prepare the data again"
        )


def _verify_shard(folder: Path, manifest: Manifest, rows: TokenRows, index: int, info: ShardInfo) -> None:
    tokens, windows = rows.read(Span(0, index, 0, info.rows))
    for row, lengths in enumerate(windows):
        if lengths.min() < manifest.min_window or lengths.max() > manifest.max_window:
            raise UserError(
                f"{folder / info.name}: row {row} holds windows of {lengths.min()} to {lengths.max()} tokens, the "
                f"manifest says {manifest.min_window} to {manifest.max_window}: prepare the data again"
            )
        if tokens[row, int(lengths.sum()) :].any():
            raise UserError(
                f"{folder / info.name}: row {row} holds tokens behind its last window: prepare the data again"
            )


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
