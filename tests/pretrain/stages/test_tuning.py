"""Supervised tuning: a trained model goes on with pairs of context and target, by the same command and loss, and learns what they ask."""

import math
from pathlib import Path

import pytest

from pretrain import train
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import tiny_pipeline, tiny_run
from tests.pretrain.conftest import APART, KNOWN, Trained

WITHOUT_CONTEXT = math.log(KNOWN) / 2
"""Nats a target token (a word and the end) of whoever knows the task but sees no context."""


def ar_values(data: Path, run: Path, kind: str, **train_section: object) -> dict:
    values = tiny_run.config_values(data, run, **{"steps": 2, "eval_every": 0, "log_every": 20} | train_section)
    values |= {"stage": "ar", "model": {"width": 32, "num_layers": 1, "head_dim": 16}}
    values["data"]["micro_batch_rows"] = tiny_run.ROWS_PER_STEP
    values["data"]["split"] = {"kind": kind, "min_tokens": 2}
    del values["repa"]
    return values


def test_tuning_teaches_what_the_pairs_ask(trained: Trained, pairs: Path, tmp_path: Path) -> None:
    base = tiny_pipeline.start(tmp_path, ar_values(trained.data, tmp_path / "base", "context"))
    nats = []
    for name, steps, lr in (("before", 1, 1e-30), ("tuned", 40, 0.03)):
        values = ar_values(pairs, tmp_path / name, "data", steps=steps, eval_every=steps, init_from=str(base))
        values["optimizer"] |= {"lr": lr, "weight_decay": 0.0}
        values["ar"] = {"context_weight": 0.0}
        run = tiny_pipeline.start(tmp_path, values)
        nats.append(read_metrics(run, "eval")[-1]["eval/nats_per_token"])
    assert nats[0] > 3.5  # log 63 is 4.14, and the text of before was random
    assert nats[1] < 0.5 * WITHOUT_CONTEXT


def test_a_dit_and_a_vae_train_on_pairs(trained: Trained, pairs: Path, tmp_path: Path) -> None:
    values = tiny_pipeline.dit_values(pairs, trained.vae, tmp_path / "dit", init_from=str(trained.dit))
    values["data"]["split"] = {"kind": "data"}
    values["train"] |= {"eval_every": 2, "eval_samples": 2}
    run = tiny_pipeline.start(tmp_path, values)
    (evaluation,), samples = read_metrics(run, "eval"), read_metrics(run, "sample")
    assert evaluation["eval/nats"] > 0
    assert samples
    for sample in samples:  # the data's own split
        assert int(sample["true"][1:]) == int(sample["context"].split()[-1][1:]) + APART
    values = tiny_run.config_values(pairs, tmp_path / "vae", steps=1, eval_every=0)
    values["data"]["split"] = {"kind": "truncate"}
    tiny_pipeline.start(tmp_path, values)


@pytest.mark.parametrize("stage", ["ar", "dit"])
def test_data_that_splits_nothing_is_refused_in_one_line(
    stage: str, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ar_values(trained.data, tmp_path / "run", "data")
    if stage == "dit":
        values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run")
        values["data"]["split"] = {"kind": "data"}
    assert train.main(["--config", str(tiny_run.write_config(tmp_path / "c.json", values))]) == 2
    said = capsys.readouterr().err.strip()
    assert f"data.split.kind is data, but {trained.data} holds windows of whole texts" in said
    assert "\n" not in said
