"""A new run that starts from another one's weights (`train.init_from`): they are its first, in the same latent space."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain import train
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.config.load import load_config
from pretrain.export.convert import convert
from pretrain.stages import exported as exported_folders
from pretrain.stages.build import build_stage, measure, take_first_weights
from pretrain.stages.latent_statistics import LATENTS_NAME, LatentStatistics
from tests.pretrain import tiny_pipeline, tiny_run
from tests.pretrain.conftest import Trained
from tests.pretrain.evaluate.token_runs import train as train_baseline


def values(trained: Trained, folder: Path, **changes: Any) -> dict:
    """Of a new run on other text, whose steps move nothing."""
    data = tiny_pipeline.write_data(folder / "data", seed=1)
    found = tiny_pipeline.dit_values(data, trained.vae, folder / "run", init_from=str(trained.dit), checkpoint_every=1)
    found["optimizer"] |= {"lr": 1e-30, "weight_decay": 0.0}
    found["train"] |= changes
    return found


def differ(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(some[name], others[name]) for name in some)


def test_its_first_weights_are_the_others_averaged_ones_and_it_stays_in_their_latent_space(
    trained: Trained, tmp_path: Path
) -> None:
    run = tiny_pipeline.start(tmp_path, values(trained, tmp_path))
    before = read_tensors(trained.dit, "ema")
    for state in ("weight", "ema"):
        found = read_tensors(run, state)
        assert found.keys() == before.keys()
        assert not differ(found, before)
    assert differ(read_tensors(trained.dit, "weight"), before)
    assert read_manifest(checkpoint_of(run)).step == 2
    statistics = LatentStatistics.load(run / LATENTS_NAME)
    assert torch.equal(statistics.mean_Z, before["latents_mean"])
    assert torch.equal(statistics.std_Z, before["latents_std"])
    # A resumed run goes on from its own checkpoint.
    resumed = values(trained, tmp_path / "again") | {"train": values(trained, tmp_path / "more")["train"]}
    resumed["data"]["path"] = str(tmp_path / "data")
    resumed["train"] |= {"run": str(run), "steps": 3}
    resumed["optimizer"] |= {"lr": 0.1}
    config = tiny_run.write_config(tmp_path / "resumed.json", resumed)
    assert train.main(["--config", str(config), "--allow-change", "optimizer.lr", "--allow-change", "train.steps"]) == 0
    assert read_manifest(checkpoint_of(run)).step == 3
    assert differ(read_tensors(run, "weight"), before)


def test_what_does_not_fit_is_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, said in (
        (trained.vae, "is a run of stage vae; expected a run or an export (textldm convert) of stage dit"),
        (tmp_path / "absent", "neither a checkpoint"),
    ):
        folder = tmp_path / Path(source).name
        config = tiny_run.write_config(tmp_path / "c.json", values(trained, folder, init_from=str(source)))
        assert train.main(["--config", str(config)]) == 2
        assert said in capsys.readouterr().err
        assert load_config(str(config), []).train.init_from == str(source)


def first_weights(run: Path, source: str, *overrides: str) -> dict[str, torch.Tensor]:
    """What a new run of the same configuration starts with."""
    config = load_config(run / "config.json", [f"train.init_from={source}", f"train.run={run}-new", *overrides])
    manifest, device = Manifest.load(config.data.path), torch.device("cpu")
    config.run_folder.mkdir(exist_ok=True)
    measure(config, manifest, device)
    stage = build_stage(config, manifest, device)
    take_first_weights(stage, config, manifest)
    return stage.state_dict()


@pytest.mark.parametrize("stage", ["vae", "dit", "ar", "mdlm"])
def test_an_export_of_every_stage_gives_the_weights_that_its_run_does(
    stage: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_baseline(stage, trained.data, tmp_path) if stage in ("ar", "mdlm") else getattr(trained, stage)
    run = Path(shutil.copytree(run, tmp_path / "copy" / stage))
    folder = convert(run, tmp_path / "export", largest="20KB")
    expected = read_tensors(run, "ema")
    found = first_weights(run, str(folder))
    assert found.keys() == expected.keys()
    assert not differ(found, expected)
    monkeypatch.setattr(exported_folders, "use_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    assert not differ(first_weights(run, "hf://me/model"), expected)
    half = first_weights(run, str(convert(run, tmp_path / "half", dtype="bf16", overwrite=True)))
    assert all(torch.equal(half[name], expected[name].bfloat16().float()) for name in half if "norm.weight" in name)


def test_an_export_that_does_not_fit_is_one_message(trained: Trained, exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.dit, tmp_path / "dit"))
    with pytest.raises(
        UserError, match=r"is the export of a run of stage vae; expected a run or an export .* of stage dit"
    ):
        first_weights(run, str(convert(trained.vae, tmp_path / "vae")))
    with pytest.raises(UserError, match=r"does not fit the model: .*is \(32, .*check the sizes in its config"):
        first_weights(run, str(exported), "model.width=48")
    other = Path(shutil.copytree(exported, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["vae.to_mean.bias"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match=r"on the latents of another VAE than model\.vae .*set model\.vae to the VAE"):
        first_weights(run, str(other))
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["model"]["unk_token"] = "w2"
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="was trained with tokenizer"):
        first_weights(run, str(other))
    (other / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="is not what textldm convert writes"):
        first_weights(run, str(other))


def test_what_only_training_has_begins_anew(trained: Trained, exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained.dit, tmp_path / "dit"))
    found = first_weights(run, str(exported), "flow.token_loss_weight=0.5")
    assert "token_head.weight" in found
    assert not differ(read_tensors(trained.dit, "ema"), found)
