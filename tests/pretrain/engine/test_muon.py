"""Newton-Schulz, which parameters are Muon's, and its update; under sharding: test_engine.py."""

import pytest
import torch
from torch import nn

from modeling.layers import Transformer
from modeling.text_dit import TextDiT, TextDiTConfig
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.config.load import load_config
from pretrain.engine.muon import Muon, hidden_matrices, orthogonalized
from pretrain.engine.optimizer_settings import MuonSettings

SETTINGS = MuonSettings(lr=2e-3, matrix_lr=2e-2, weight_decay=0.1)


def with_singular_values(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A random matrix that has these."""
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return left @ torch.diag(values.double()) @ right.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 24), (96, 24), (24, 96)])
def test_singular_values_come_close_to_one_in_both_precisions(shape, dtype):
    torch.manual_seed(0)
    matrix = with_singular_values(torch.linspace(0.05, 1, 24), *shape)
    found = orthogonalized(matrix[None].to(dtype))[0].float()
    scale = max(1.0, shape[0] / shape[1]) ** 0.5
    values = torch.linalg.svdvals(found) / scale
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_directions_stay_and_size_does_not_matter():
    torch.manual_seed(0)
    matrix = torch.randn(16, 16, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix)
    found = orthogonalized(matrix[None])[0]
    in_its_own_basis = left.T @ found @ right.T
    torch.testing.assert_close(in_its_own_basis, torch.diag(in_its_own_basis.diagonal()), atol=1e-9, rtol=0)
    torch.testing.assert_close(orthogonalized(1e-9 * matrix[None])[0], found)
    assert not orthogonalized(torch.zeros(2, 4, 3)).any()


def test_stacks_are_computed_apart():
    torch.manual_seed(0)
    stack = torch.randn(5, 12, 8)
    apart = torch.cat([orthogonalized(matrix[None]) for matrix in stack])
    torch.testing.assert_close(orthogonalized(stack), apart)


def names_of(module: nn.Module) -> dict[str, int]:
    names = {p: name for name, p in module.named_parameters()}
    return {names[p]: count for p, count in hidden_matrices(module).items()}


def test_the_blocks_say_which_matrices_are_hidden():
    config = TextDiTConfig(latent_dim=4, width=32, num_layers=1, head_dim=16, time_conditioning="adaln_zero")
    block = "transformer.blocks.0"
    assert names_of(TextDiT(config)) == {
        f"{block}.attention.qkv.weight": 3, f"{block}.attention.out.weight": 1, f"{block}.mlp_in.weight": 1,
        f"{block}.mlp_out.weight": 1, f"{block}.modulation.weight": 6,
    }  # fmt: skip
    vae = TextVAE(
        TextVAEConfig(vocab_size=50, latent_dim=4, width=32, num_encoder_layers=2, num_decoder_layers=1, head_dim=16)
    )
    assert len(names_of(vae)) == 3 * 4
    assert all(".blocks." in name for name in names_of(vae))
    weights = {name for name, p in vae.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert names_of(vae).keys() == weights


def test_groups_have_their_own_states_and_rates():
    optimizer = Muon(Transformer(1, 32, 16, 1e4), SETTINGS)
    optimizer.prepare(1, lr=1e-3, ema_decay=0.9)
    groups = {group["label"]: group for group in optimizer.param_groups}
    assert groups.keys() == {"matrices", "no decay"}
    assert optimizer.states_of(groups["matrices"]) == ("weight", "momentum", "ema")
    assert optimizer.states_of(groups["no decay"]) == ("weight", "exp_avg", "exp_avg_sq", "ema")
    assert groups["matrices"]["lr"] == pytest.approx(1e-2)
    assert groups["no decay"]["lr"] == pytest.approx(1e-3)


def test_a_step_moves_queries_keys_and_values_by_the_rate_each():
    torch.manual_seed(0)
    stack = Transformer(1, 32, 16, 1e4)
    weight = stack.blocks[0].attention.qkv.weight
    before = weight.detach().clone()
    for p in stack.parameters():
        p.grad = torch.randn_like(p)
    sizes = (1e-3, 1.0, 1e2)  # of the gradients of queries, keys and values
    parts = [size * with_singular_values(torch.linspace(0.2, 1, 32), 32, 32) for size in sizes]
    weight.grad = torch.cat(parts).float()
    optimizer = Muon(stack, SETTINGS)
    optimizer.prepare(1, SETTINGS.lr, ema_decay=0.5)
    optimizer.step()
    change = weight.detach() - (1 - 2e-2 * 0.1) * before
    for part in change.chunk(3):
        values = torch.linalg.svdvals(part)
        assert 0.65 < values.min() / 2e-2 < values.max() / 2e-2 < 1.25
    torch.testing.assert_close(optimizer.state[weight]["ema"], (before + weight.detach()) / 2)


def test_a_shipped_configuration_takes_it_by_one_key():
    settings = load_config("dit_b", ["optimizer.kind=muon"]).optimizer
    assert isinstance(settings, MuonSettings)
    assert (settings.matrix_lr, settings.betas) == (0.02, (0.9, 0.95))
