"""The benchmark of the baselines trains all four and compares nats of the same targets; on random data, a few steps."""

import json
from pathlib import Path

import pytest

from benchmarks import baselines
from tests.pretrain import tiny_pipeline, tiny_run

NARROW = ["model.width=32", "model.num_layers=1", "model.head_dim=16", "data.split.min_tokens=2"]


@pytest.mark.slow
def test_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline.write_data(tmp_path / "data")
    tiny_pipeline.start(tmp_path, tiny_run.config_values(tmp_path / "data", tmp_path / "vae", steps=2, eval_every=0))
    models = {
        name: (config, [*settings, *NARROW, *(["model.latent_dim=4"] if config == "quickstart_dit" else [])])
        for name, (config, settings) in baselines.MODELS.items()
    }
    monkeypatch.setattr(baselines, "MODELS", models)
    assert baselines.main(["--quickstart", str(tmp_path), "--steps", "3", "--rows", "6"]) in (0, None)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for column in ("nats", "errors", "parameters", "seconds", "tokens"):
        assert set(figures[column]) == {"velocity", "categorical", "mdlm", "ar"}
        assert all(value > 0 for value in figures[column].values())
    assert figures["unigram"] == pytest.approx(4.14, abs=0.2)
    for name in ("mdlm", "ar"):  # untrained on random tokens
        assert abs(figures["nats"][name] - figures["unigram"]) < 0.5
    assert len(set(figures["tokens"].values())) == 1
