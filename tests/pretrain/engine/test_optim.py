"""The schedule as a function of the step, the groups, and AdamW with its EMA against torch's own and a formula."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from data_pipeline.core.errors import UserError
from pretrain.engine.optim import AdamWithEMA, Optimizer, Schedule, learning_rate, parameter_groups
from tests.pretrain.engine_toy import ToyStage


def rates(schedule: Schedule, total_steps: int) -> list[float]:
    return [learning_rate(step, 2.0, schedule, total_steps) for step in range(total_steps + 3)]


def test_cosine_warms_up_decays_to_its_floor_and_stays_there():
    lr = rates(Schedule(kind="cosine", warmup_steps=4, min_ratio=0.1), 24)
    assert lr[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert lr[4] == pytest.approx(2.0)
    assert lr[14] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)), "half way down"
    assert lr[24:] == pytest.approx([0.2] * 3)
    assert all(a >= b for a, b in pairwise(lr[4:]))


def test_constant_and_wsd():
    assert rates(Schedule(kind="constant", warmup_steps=2), 5) == pytest.approx([1.0] + [2.0] * 7)
    lr = rates(Schedule(kind="wsd", decay_steps=4), 10)
    assert lr[:7] == pytest.approx([2.0] * 7)
    assert lr[6:] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0, 0.0, 0.0])
    assert rates(Schedule(kind="wsd"), 100)[89:92] == pytest.approx([2.0, 2.0, 1.8]), "the last tenth by default"


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_no_schedule_divides_by_zero(kind):
    assert rates(Schedule(kind=kind), 1)[0] == pytest.approx(2.0)
    assert rates(Schedule(kind=kind, warmup_steps=5), 3)[2] == pytest.approx(1.2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule(kind="linear"),
        lambda: Schedule(min_ratio=2),
        lambda: Optimizer(lr=1e-3, ema_decay=1.0),
        lambda: Optimizer(lr=1e-3, grad_clip=-1),
        lambda: Optimizer(lr=1e-3, betas=(0.9, 1.0)),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="validation error"):
        make()


def test_ema_decay_warms_up():
    settings = Optimizer(lr=1e-3, ema_decay=0.99)
    assert settings.ema_decay_at(0) == pytest.approx(0.1)
    assert settings.ema_decay_at(90) == pytest.approx(0.91)
    assert settings.ema_decay_at(10**6) == 0.99
    assert Optimizer(lr=1e-3, ema_decay=0.99, ema_warmup=False).ema_decay_at(0) == 0.99


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


def test_update_is_torchs_adamw_with_scaled_gradients_and_the_ema_follows():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))
    copies = [nn.Parameter(x.detach().clone()) for x in (p, q)]
    optimizer = AdamWithEMA([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], lr=0.1, foreach=False)
    plain = torch.optim.AdamW(
        [{"params": [copies[0]]}, {"params": [copies[1]], "weight_decay": 0.0}], lr=0.1, foreach=False
    )
    optimizer.ema_decay, optimizer.clip_factor = 0.75, 0.5
    ema = p.detach().clone()
    for _ in range(3):
        for own, copy in zip((p, q), copies):
            copy.grad = torch.randn_like(copy)
            own.grad = 2 * copy.grad
        optimizer.step()
        plain.step()
        ema = 0.75 * ema + 0.25 * copies[0].detach()
    assert torch.equal(p, copies[0])
    assert torch.equal(q, copies[1])
    torch.testing.assert_close(optimizer.state[p]["ema"], ema)


def test_a_skipped_step_changes_no_bit():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamWithEMA([p], lr=0.1, foreach=False)
    optimizer.ema_decay = 0.5
    p.grad = torch.ones(3)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[p].items()} | {"p": p.detach().clone()}
    optimizer.skip, p.grad = True, torch.full((3,), torch.nan)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[p].items())
    assert torch.equal(p, before["p"])
