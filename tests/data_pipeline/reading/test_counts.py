"""Counts of tokens are those of the windows, without filler."""

import numpy as np
import torch

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.counts import token_counts
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from tests.pretrain import tiny_run


def test_every_token_of_every_window_is_counted_and_no_filler(tmp_path) -> None:
    folder = str(tiny_run.write_data(tmp_path / "data"))
    manifest = Manifest.load(folder)
    for split in ("train", "heldout"):
        counts_V = token_counts(folder, manifest, split)  # type: ignore[arg-type]
        assert int(counts_V.sum()) == sum(shard.tokens for shard in manifest.splits[split])
        assert counts_V[0] == 0  # which is the filler's
        first = TokenRows(folder, manifest, split).read(Span(0, 0, 0, manifest.splits[split][0].rows))[0]  # type: ignore[arg-type]
        assert (counts_V.numpy() >= np.bincount(first[:, :30].ravel(), minlength=len(counts_V))).all()


def test_the_first_shards_are_enough_where_few_rows_are_wanted(tmp_path) -> None:
    folder = str(tiny_run.write_data(tmp_path / "data"))
    manifest = Manifest.load(folder)
    first = manifest.splits["train"][0]
    few_V = token_counts(folder, manifest, max_rows=first.rows)
    assert int(few_V.sum()) == first.tokens
    assert int(token_counts(folder, manifest, max_rows=1).sum()) < first.tokens
    assert torch.equal(token_counts(folder, manifest, max_rows=10**9), token_counts(folder, manifest))
