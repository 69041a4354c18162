"""The benchmarks of checkpoints and exports run and say what the documents quote; on a model of a few thousand parameters."""

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint, convert
from data_pipeline.core.errors import UserError
from modeling.text_dit import TextDiT, TextDiTConfig
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


def test_what_a_run_of_two_ranks_holds_is_shared_out_whole() -> None:
    model = TextDiT(TextDiTConfig(latent_dim=4, width=32, head_dim=16, num_layers=1))
    found: dict[str, list[tuple[int, int, int]]] = {}
    for rank, name, start, numel in convert.ranges(model, 2):
        found.setdefault(name, []).append((start, numel, rank))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert {name: sum(numel for _, numel, _ in parts) for name, parts in found.items()} == sizes
    assert max(map(len, found.values())) == 2  # where a group is cut
    by_rank = [sum(numel for parts in found.values() for _, numel, rank in parts if rank == each) for each in (0, 1)]
    assert abs(by_rank[0] - by_rank[1]) <= 2


@pytest.mark.slow
def test_what_an_export_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"path": "nowhere", "streams": 1, "rows_per_step": 1, "micro_batch_rows": 1}
    common = {"optimizer": {"lr": 0.1}, "train": {"steps": 1}}
    dit = {"stage": "dit", "model": {"vae": "nowhere", "latent_dim": 4, "width": 64, "num_layers": 1}, **common}
    vae = {
        "stage": "vae",
        "model": {"latent_dim": 4, "width": 64, "num_encoder_layers": 1, "num_decoder_layers": 1},
        **common,
    }
    vae["model"]["vocab_size"] = 300
    (tmp_path / "dit.json").write_text(json.dumps(dit | {"data": data | {"split": {"kind": "context"}}}))
    (tmp_path / "vae.json").write_text(
        json.dumps(vae | {"data": data | {"split": {"kind": "none"}}, "repa": {"weight": 0.0}})
    )
    arguments = ["--config", str(tmp_path / "dit.json"), "--vae", str(tmp_path / "vae.json"), "--repetitions", "1"]
    assert convert.main([*arguments, "--max-shard-size", "100KB", "--folder", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["files"] > 2
    assert figures["exported_gb"] * 1e9 == pytest.approx(
        4 * (figures["parameters"] + figures["vae_parameters"]), rel=0.1
    )
    assert figures["time_ratio"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.json", "vae.json"]
