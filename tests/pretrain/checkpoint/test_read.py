"""Restoring without DeepSpeed and in one process: what is exact, what is refused."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors, restore, verify
from pretrain.checkpoint.slices import write_slices
from tests.pretrain.bare_engine import bare_engine, save, states_of
from tests.pretrain.engine_toy import ToyStage
from tests.pretrain.toy_sgd import ToySGDSettings, install_toy_sgd


def test_save_and_restore_are_exact(tmp_path: Path):
    saved, loaded = bare_engine(seed=3), bare_engine(seed=4)
    saved.stage.latents_mean += 1
    path = save(tmp_path, 7, saved)
    manifest = restore(path, loaded)
    assert (manifest.step, manifest.updates, manifest.extra) == (7, 3, {"note": 7})
    assert states_of(saved).keys() == states_of(loaded).keys()
    assert all(torch.equal(states_of(saved)[name], tensor) for name, tensor in states_of(loaded).items())
    assert torch.equal(loaded.stage.latents_mean, saved.stage.latents_mean)
    assert loaded.updates == 3


def test_tensors_read_without_an_engine_load_into_the_module(tmp_path: Path):
    engine = bare_engine(seed=1)
    save(tmp_path, 1, engine)
    stage = ToyStage()
    stage.load_state_dict(read_tensors(tmp_path, "weight"))
    assert all(torch.equal(p, engine.stage.state_dict()[name]) for name, p in stage.state_dict().items())
    assert not torch.equal(read_tensors(tmp_path, "ema")["scale"], stage.scale)
    with pytest.raises(UserError, match="no state 'momentum'"):
        read_tensors(tmp_path, "momentum")


def test_other_models_are_refused_by_name(tmp_path: Path):
    path = save(tmp_path, 1, bare_engine())
    stage = ToyStage()
    stage.aux = nn.Linear(11, 6)
    with pytest.raises(UserError, match=r"aux.bias of shape \[5\], the model wants \[6\]"):
        restore(path, bare_engine(stage))
    stage.aux = None
    stage.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"has aux.bias, which the model does not have.*lacks extra"):
        restore(path, bare_engine(stage))
    stage = ToyStage()
    stage.aux.weight.no_weight_decay = True
    with pytest.raises(UserError, match=r"trained aux\.weight with weight decay, the model wants it without"):
        restore(path, bare_engine(stage))


def test_missing_ranges_are_noticed(tmp_path: Path):
    path = save(tmp_path, 1, bare_engine())
    with safe_open(f"{path}/rank-00000.safetensors", "pt") as file:
        names = [name for name in file.keys() if name != "ema/scale@0"]  # noqa: SIM118
        tensors = [(name, file.get_tensor(name).clone()) for name in names]
    manifest = read_manifest(path)
    manifest.files["rank-00000.safetensors"] = write_slices(path, "rank-00000.safetensors", tensors)
    manifest.save(path)
    with pytest.raises(UserError, match="incomplete"):
        verify(path)
    with pytest.raises(UserError, match="incomplete"):
        restore(path, bare_engine())


def test_the_states_of_another_optimizer_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_toy_sgd(tmp_path / "site", monkeypatch)
    sgd = bare_engine(optimizer=ToySGDSettings(lr=0.1), seed=3)
    path = save(tmp_path, 1, sgd)
    assert read_manifest(path).states == ["weight", "velocity", "ema"]
    assert torch.equal(read_tensors(tmp_path, "velocity")["scale"], states_of(sgd)["velocity/scale"])
    with pytest.raises(
        UserError, match=r"has of .* weight, velocity, ema, the optimizer wants weight, exp_avg, exp_avg_sq, ema"
    ):
        restore(path, bare_engine())
