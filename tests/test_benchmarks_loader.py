"""The benchmark of the loader says what the documents quote, and its contenders do the same job."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks import loader as benchmark
from benchmarks.loader_peers import PEERS, Job, Peer, finished
from data_pipeline.reading.batch import Batch, Split
from data_pipeline.reading.loader import TrainLoader


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--shards", "8", "--shard-rows", "6", "--batch-rows", "8", "--repetitions", "1", "--resume-shards", "64"]
    assert benchmark.main([*sizes, "--quickstart", str(tmp_path / "none")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = figures["tokens_per_s"]
    measured = {name for name in rates if ":" not in name} - {"loader", "loader_first_pass"}
    assert measured | set(figures["missing"]) == {peer.name for peer in PEERS}
    alone = max(rates[f"{name}: rows alone"] for name in measured)
    assert figures["loader_over_best_rows_alone"] == rates["loader"] / alone
    assert all("pip install" in reason for reason in figures["missing"].values())
    best = max(rates[name] for name in measured)
    assert figures["loader_over_best_peer"] == rates["loader"] / best
    assert figures["first_pass_over_best_peer"] == rates["loader_first_pass"] / best
    assert rates[figures["best_peer"]] == best
    assert figures["resume_ratio"] > 0
    assert figures["wait_share"] is None
    assert {"commit", "date", "machine"} <= figures.keys()


def rows_of(batch: Batch) -> list[tuple]:
    """Tokens of each row with the lengths and roles of its segments."""
    found, row_tokens = [], batch.row_tokens
    ends, roles = np.cumsum(batch.segment_lengths), np.array(batch.segment_roles)
    for row, tokens in enumerate(batch.tokens_T.view(-1, row_tokens)):
        own = (ends > row * row_tokens) & (ends <= (row + 1) * row_tokens)
        found.append((*tokens.tolist(), *np.array(batch.segment_lengths)[own].tolist(), *roles[own].tolist()))
    return found


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_ends_with_the_rows_that_the_loader_gives(peer: Peer, tmp_path: Path) -> None:
    if (reason := peer.missing()) is not None:
        pytest.skip(reason)
    manifest = benchmark.random_folder(tmp_path / "data", 4, 6, 1024)
    job = Job(tmp_path / "data", manifest, tmp_path / peer.name, 4)
    peer.write(job)
    split = Split(kind="none")  # places of cuts follow a row's number in the order, which is each loader's own
    options = {"streams": 4, "rows_per_step": 4, "micro_batch_rows": 1, "split": split, "workers": 0}
    loader = TrainLoader(tmp_path / "data", None, seed=0, **options)
    expected = [row for _ in range(6) for batch in loader.next_step() for row in rows_of(batch)]
    batches = finished(peer.batches(job), split)
    for _ in range(2):  # passes
        assert sorted(row for batch in islice(batches, 6) for row in rows_of(batch)) == sorted(expected)
