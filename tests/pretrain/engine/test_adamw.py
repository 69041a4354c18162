"""AdamW with its EMA against torch's own and a formula."""

import pytest
import torch
from torch import nn

from pretrain.engine.adamw import AdamW
from pretrain.engine.optimizer_settings import AdamWSettings

DECAY = 0.75


def trained(num_steps: int, size: int = 40_000) -> tuple[AdamW, nn.Linear, nn.Linear, torch.Tensor]:
    """An optimizer after some steps, its layer, torch's own result from the same gradients halved, and the weights' EMA by hand."""
    torch.manual_seed(0)
    layer, copy = nn.Linear(2, size), nn.Linear(2, size)
    copy.load_state_dict(layer.state_dict())
    optimizer = AdamW(layer, AdamWSettings(lr=0.1, weight_decay=0.01))
    groups = [{"params": [copy.weight]}, {"params": [copy.bias], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.01, foreach=False)
    ema = layer.weight.detach().clone()
    for number in range(num_steps):
        for own, other in zip(layer.parameters(), copy.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            own.grad = 2 * other.grad
        optimizer.prepare(number + 1, 0.1, DECAY, clip_factor=0.5)
        optimizer.step()
        plain.step()
        ema = DECAY * ema + (1 - DECAY) * copy.weight.detach()
    return optimizer, layer, copy, ema


def test_update_is_torchs_adamw_with_scaled_gradients_and_the_ema_follows():
    optimizer, layer, copy, ema = trained(3)
    assert torch.equal(layer.weight, copy.weight)
    assert torch.equal(layer.bias, copy.bias)
    torch.testing.assert_close(optimizer.state[layer.weight]["ema"], ema)


def test_the_fused_kernel_that_gpus_take_does_the_same(monkeypatch: pytest.MonkeyPatch):
    expected = trained(3)[1]

    def fused(self, weight, grad, states, group):
        self.fused(weight, grad, states["exp_avg"], states["exp_avg_sq"], group)

    monkeypatch.setattr(AdamW, "update", fused)
    torch.testing.assert_close(trained(3)[1].weight, expected.weight)
