"""The benchmark of the loader says what the documents quote, and its contenders do the same job."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import loader as benchmark
from benchmarks.loader_peers import PEERS, Job, Peer
from data_pipeline.batch import FILLER, SplitConfig
from data_pipeline.loader import TrainLoader


def test_loader(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--shards", "8", "--shard-rows", "6", "--batch-rows", "8", "--repetitions", "1", "--resume-shards", "64"]
    assert benchmark.main([*sizes, "--quickstart", str(tmp_path / "none")]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = figures["tokens_per_s"]
    measured = set(rates) - {"loader", "loader_first_pass"}
    assert measured | set(figures["missing"]) == {peer.name for peer in PEERS}
    assert all("pip install" in reason for reason in figures["missing"].values())
    best = max(rates[name] for name in measured)
    assert figures["loader_over_best_peer"] == rates["loader"] / best
    assert figures["first_pass_over_best_peer"] == rates["loader_first_pass"] / best
    assert rates[figures["best_peer"]] == best
    assert figures["resume_ratio"] > 0
    assert figures["wait_share"] is None
    assert {"commit", "date", "machine"} <= figures.keys()


def pieces(rows: torch.Tensor, lengths: list) -> list[tuple]:
    return [(tuple(row.tolist()), tuple(np.asarray(windows).tolist())) for row, windows in zip(rows, lengths)]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_delivers_the_rows_that_the_loader_delivers(peer: Peer, tmp_path: Path) -> None:
    if (reason := peer.missing()) is not None:
        pytest.skip(reason)
    manifest = benchmark.random_folder(tmp_path / "data", 4, 6, 1024)
    job = Job(tmp_path / "data", manifest, tmp_path / peer.name, 4)
    peer.write(job)
    found = [piece for tokens, lengths in peer.batches(job) for piece in pieces(tokens, lengths)]
    options = {"streams": 4, "rows_per_step": 4, "micro_batch_rows": 1, "split": SplitConfig("none"), "workers": 0}
    loader = TrainLoader(tmp_path / "data", None, seed=0, **options)
    expected = []
    for batch in (batch for _ in range(6) for batch in loader.next_step()):
        windows = [n for n, role in zip(batch.segment_lengths, batch.segment_roles) if role != FILLER]
        expected += pieces(batch.tokens_T[None], [windows])
    assert len(found) == 24
    assert sorted(found) == sorted(expected)
