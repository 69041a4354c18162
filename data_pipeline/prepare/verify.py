"""A check of a whole prepared folder: every hash, every row, the tokenizer, and that nothing else lies there."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest, ShardInfo
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text.tokenization import load_prepared_tokenizer

_WORKERS = 4


def verify(folder: Path) -> Iterator[str]:
    """Check every shard: size, hash, format, window and context lengths, counts, token ids, empty tails; and that tokenizer and
    shards are those of the manifest. Raises UserError at the first deviation.
    """
    manifest = Manifest.load(folder)
    load_prepared_tokenizer(str(folder), manifest.tokenizer)
    _verify_names(folder, manifest)
    for split, shards in manifest.splits.items():
        rows = TokenRows(str(folder), manifest, split, verify=True, capacity=2 * _WORKERS)
        with ThreadPoolExecutor(_WORKERS) as pool:
            list(pool.map(lambda item, rows=rows: _verify_shard(folder, manifest, rows, *item), enumerate(shards)))
        pairs = ", a context and a target in each window" if manifest.pairs else ""
        yield f"{split}: {len(shards)} shards, {sum(shard.rows for shard in shards)} rows{pairs}: all as the manifest says"


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
