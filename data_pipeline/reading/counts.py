"""How often each token occurs in prepared text."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows


def token_counts(
    folder: str,
    manifest: Manifest,
    split: Literal["train", "heldout"] = "train",
    max_rows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Tensor:
    """int64 [V] over all windows of a split, without the rows' filler.

    max_rows: read the first shards alone, until they have given so many rows; documents go to shards by their hash, so these are a
    random sample. rank, world_size: read every so many-th of these shards; the counts of all ranks add up. options: of `TokenRows`.
    """
    rows = TokenRows(folder, manifest, split, **options)
    counts_V = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    left = sum(shard.rows for shard in manifest.splits[split]) if max_rows is None else max_rows
    for index, shard in enumerate(manifest.splits[split]):
        wanted, left = min(shard.rows, left), left - shard.rows
        if index % world_size == rank:
            tokens_BR, lengths = rows.read(Span(0, index, 0, wanted))
            for tokens_R, row_lengths in zip(tokens_BR, lengths, strict=True):
                counts_V += np.bincount(tokens_R[: row_lengths.sum()], minlength=len(counts_V))
        if left <= 0:
            break
    return torch.from_numpy(counts_V)
