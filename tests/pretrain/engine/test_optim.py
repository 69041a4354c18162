"""What all optimizers have in common: groups, EMA, skipping; and how they are found by name."""

from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import keys
from pretrain.config.load import load_config
from pretrain.engine.adamw import AdamW
from pretrain.engine.optim import parameter_groups
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.stages.dit_config import DiTRun
from tests.pretrain.engine_toy import ToyStage
from tests.pretrain.toy_sgd import ToySGDSettings, install_toy_sgd


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdamWSettings(lr=1e-3, ema_decay=1.0),
        lambda: AdamWSettings(lr=1e-3, grad_clip=-1),
        lambda: AdamWSettings(lr=1e-3, betas=(0.9, 1.0)),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="validation error"):
        make()


def test_ema_decay_warms_up():
    settings = AdamWSettings(lr=1e-3, ema_decay=0.99)
    assert settings.ema_decay_at(0) == pytest.approx(0.1)
    assert settings.ema_decay_at(90) == pytest.approx(0.91)
    assert settings.ema_decay_at(10**6) == 0.99


def test_groups_by_kind_of_parameter():
    stage = ToyStage()
    stage.last.down.weight.no_weight_decay = True
    names = {p: name for name, p in stage.named_parameters()}
    decay, no_decay = parameter_groups(stage, 0.1)
    assert {names[p] for p in decay["params"]} == {
        "block.up.weight", "block.down.weight", "last.up.weight", "aux.weight", "null",
    }  # fmt: skip
    assert {"embedding.weight", "last.down.weight", "scale", "block.norm.weight", "aux.bias"} <= {
        names[p] for p in no_decay["params"]
    }
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_a_frozen_model_is_refused():
    with pytest.raises(UserError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


def test_a_skipped_step_changes_no_bit():
    layer = nn.Linear(3, 2)
    optimizer = AdamW(layer, AdamWSettings(lr=0.1))
    optimizer.prepare(1, 0.1, ema_decay=0.5)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    states = [layer.weight, layer.bias, *(tensor for p in layer.parameters() for tensor in optimizer.state[p].values())]
    before = [tensor.detach().clone() for tensor in states]
    optimizer.prepare(2, 0.1, ema_decay=0.5, skip=True)
    layer.weight.grad.fill_(torch.nan)
    optimizer.step()
    assert len(before) == 8
    assert all(torch.equal(tensor, old) for tensor, old in zip(states, before, strict=True))


def test_a_section_is_that_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    install_toy_sgd(tmp_path, monkeypatch)
    config = load_config("dit_b", ['optimizer={"kind": "toy_sgd", "lr": 1e-3, "momentum": 0.8}'])
    assert isinstance(config, DiTRun)
    assert config.optimizer == ToySGDSettings(lr=1e-3, momentum=0.8)
    assert config.model_dump(mode="json")["optimizer"]["momentum"] == 0.8
    names = {key.name for key in keys(type(config))}
    assert "optimizer.momentum" in names
    assert "optimizer.betas" not in names
    with pytest.raises(UserError, match=r'optimizer\.kind .*is "sgd"; expected one of adamw, .*toy_sgd'):
        load_config("dit_b", ["optimizer.kind=sgd"])
    with pytest.raises(UserError, match=r"unknown key optimizer\.momentum"):
        load_config("dit_b", ["optimizer.momentum=0.8"])
    assert isinstance(load_config("dit_b").optimizer, AdamWSettings)
