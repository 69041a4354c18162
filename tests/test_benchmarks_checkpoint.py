"""The benchmark of checkpoints runs and says what the documents quote; on a model of a few thousand parameters."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint
from data_pipeline.core.errors import UserError
from modeling.text_dit import TextDiT
from pretrain.config.load import load_config


def test_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "stage": "dit", "model": {"vae": "nowhere", "latent_dim": 16, "width": 128, "num_layers": 2},
        "data": {"path": "nowhere", "streams": 1, "rows_per_step": 1, "micro_batch_rows": 1, "split": {"kind": "context"}},
        "optimizer": {"lr": 0.1}, "train": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(values))
    arguments = ["--config", str(tmp_path / "c.json"), "--folder", str(tmp_path), "--repetitions", "1"]
    assert checkpoint.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = TextDiT(load_config(str(tmp_path / "c.json"), []).model.architecture())
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert figures["stall_over_blocking_save"] > 0
    assert 1 < figures["bytes_over_minimum"] == figures["checkpoint_gb"] * 1e9 / 16 / figures["parameters"]
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_memory_decides_on_layers() -> None:
    assert checkpoint.shape_that_fits("dit_xl", 1e12).num_layers == 39
    assert checkpoint.shape_that_fits("dit_xl", 5e9).num_layers < 39
    with pytest.raises(UserError, match="not even one layer"):
        checkpoint.shape_that_fits("dit_xl", 1e6)
    with pytest.raises(UserError, match="expected one of stage dit"):
        checkpoint.shape_that_fits("vae_base", 1e12)
