"""How often each token occurs in prepared text."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows


def token_counts(
    folder: str, manifest: Manifest, split: Literal["train", "heldout"] = "train", **options: Any
) -> Tensor:
    """int64 [V] over all windows of a split, without the rows' filler; options: of `TokenRows`."""
    rows = TokenRows(folder, manifest, split, **options)
    counts_V = np.zeros(manifest.tokenizer.vocab_size, np.int64)
    for index, shard in enumerate(manifest.splits[split]):
        tokens_BR, lengths = rows.read(Span(0, index, 0, shard.rows))
        for tokens_R, row_lengths in zip(tokens_BR, lengths, strict=True):
            counts_V += np.bincount(tokens_R[: row_lengths.sum()], minlength=len(counts_V))
    return torch.from_numpy(counts_V)
