"""Texts at held-out evaluations: the same under every sharding, and training takes no notice of them."""

import json
from pathlib import Path

import forked_ranks
import pytest
import tiny_pipeline
import tiny_run
import torch

from pretrain.checkpoint import read_tensors
from pretrain.optim import STATES


def samples(run: Path) -> list[dict]:
    """Those that a run has written, without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "context", "generated", "true")
    return [{key: line[key] for key in keys} for line in lines if line["kind"] == "sample"]


def values_of(trained, run: Path, **train: object) -> dict:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, run)
    values["train"] |= {"eval_every": 2, "eval_samples": 3, **train}
    return values


def test_an_evaluation_writes_texts_and_changes_nothing(trained, tmp_path: Path, capsys) -> None:
    run = tiny_pipeline.start(tmp_path, values_of(trained, tmp_path / "run"))
    found = samples(run)
    assert len(found) == 3
    for sample in found:
        assert sample["step"] == 2
        for name in ("context", "generated", "true"):
            assert sample[name] == "" or set(sample[name].split()) <= set(tiny_pipeline.WORDS)
        assert sample["true"] != sample["context"] != ""
    assert f"generated    {json.dumps(found[0]['generated'])}" in capsys.readouterr().out
    for state in STATES:
        expected = read_tensors(trained.dit, state)  # which made no evaluation
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensors(run, state).items())


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero_stage", "precision"), [(2, 3, "fp32"), (1, 3, "fp32"), (2, 2, "bf16")])
def test_the_texts_do_not_depend_on_sharding(
    trained, tmp_path: Path, ranks: int, zero_stage: int, precision: str
) -> None:
    values = values_of(trained, tmp_path / "run", zero_stage=zero_stage, precision=precision, steps=4)
    config = tiny_run.write_config(tmp_path / "c.json", values)
    assert forked_ranks.finish(forked_ranks.start(config, ranks=ranks)) == [0] * ranks, config.with_suffix(
        ".log"
    ).read_text()[-5000:]
    alone = tiny_pipeline.start(
        tmp_path, values_of(trained, tmp_path / "alone", zero_stage=0, precision="fp32", steps=4)
    )
    found, expected = samples(tmp_path / "run"), samples(alone)
    assert len(found) == 6
    if precision == "fp32":
        assert found == expected
