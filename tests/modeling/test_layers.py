"""Blocks: packing changes nothing, positions are relative, the initialisation is the table's, checkpointing is free of effect."""

import math

import pytest
import torch
from torch import nn

from modeling.attention import Segments
from modeling.layers import Attention, Block, Transformer, apply_rope, initialize, rope_tables, time_embedding

LENGTHS = [5, 1, 140, 9, 30]


def make_stack(modulated: bool = False, qk_norm: bool = False, dtype: torch.dtype = torch.float64) -> Transformer:
    """Three small blocks with weights far from zero."""
    torch.manual_seed(0)
    stack = Transformer(3, 32, 8, 10_000.0, qk_norm=qk_norm, modulated=modulated)
    for p in stack.parameters():
        nn.init.normal_(p, std=0.3)
    return stack.to(dtype)


@pytest.mark.parametrize(("modulated", "qk_norm"), [(False, False), (True, True)])
def test_a_packed_batch_equals_each_segment_alone(modulated: bool, qk_norm: bool) -> None:
    stack = make_stack(modulated, qk_norm)
    x_TD = torch.randn(sum(LENGTHS), 32, dtype=torch.float64, requires_grad=True)
    condition_TD = torch.randn_like(x_TD) if modulated else None
    slope_TD = torch.randn_like(x_TD)

    packed_TD = stack(x_TD, Segments.from_lengths(LENGTHS), condition_TD)
    parameters = [x_TD, *stack.parameters()]
    packed_grads = torch.autograd.grad(packed_TD, parameters, slope_TD)

    conditions = condition_TD.split(LENGTHS) if condition_TD is not None else [None] * len(LENGTHS)
    parts = [
        stack(part, Segments.from_lengths([len(part)]), condition)
        for part, condition in zip(x_TD.split(LENGTHS), conditions)
    ]
    alone_TD = torch.cat(parts)
    alone_grads = torch.autograd.grad(alone_TD, parameters, slope_TD)
    torch.testing.assert_close(packed_TD, alone_TD, rtol=1e-10, atol=1e-10)
    for packed, alone in zip(packed_grads, alone_grads):
        torch.testing.assert_close(packed, alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("modulated", [False, True])
def test_checkpointing_changes_nothing(every: int, modulated: bool) -> None:
    stack = make_stack(modulated, dtype=torch.float32).train()
    x_TD, segments = torch.randn(sum(LENGTHS), 32, requires_grad=True), Segments.from_lengths(LENGTHS)
    condition_TD = torch.randn(sum(LENGTHS), 32, requires_grad=True) if modulated else None
    inputs = [x_TD, *stack.parameters(), *([condition_TD] if condition_TD is not None else [])]
    results = []
    for stack.checkpoint_every in (0, every):
        output_TD = stack(x_TD, segments, condition_TD)
        results.append([output_TD, *torch.autograd.grad(output_TD.square().sum(), inputs)])
    for kept, recomputed in zip(*results):
        assert torch.equal(kept, recomputed)


def test_checkpointing_keeps_fewer_activations() -> None:
    stack, segments, kept = make_stack(dtype=torch.float32).train(), Segments.from_lengths(LENGTHS), []
    for stack.checkpoint_every in (0, 2, 1):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            stack(torch.randn(sum(LENGTHS), 32, requires_grad=True), segments)
        kept.append(sum(sizes))
    assert kept[0] > 1.5 * kept[1] > 2 * kept[2]


def test_rope_depends_on_the_distance_alone_and_turns_only() -> None:
    torch.manual_seed(0)
    q_K, k_K = torch.randn(2, 16)

    def score(q_position: int, k_position: int) -> float:
        tables = rope_tables(torch.tensor([q_position, k_position]), 16, 10_000.0)
        q, k = apply_rope(torch.stack((q_K, k_K))[:, None], *tables)
        return float((q * k).sum())

    assert score(3, 7) == pytest.approx(score(103, 107), abs=1e-4)
    assert score(3, 7) != pytest.approx(score(3, 8), abs=1e-2)
    assert score(5, 5) == pytest.approx(float(q_K @ k_K), abs=1e-5)
    x_THK = torch.randn(50, 2, 16)
    rotated_THK = apply_rope(x_THK, *rope_tables(torch.arange(50), 16, 10_000.0))
    torch.testing.assert_close(rotated_THK.norm(dim=-1), x_THK.norm(dim=-1))


def test_initial_weights_are_those_of_the_table() -> None:
    num_layers, width = 8, 256

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(500, width)
            self.stack = Transformer(num_layers, width, 32, 10_000.0, qk_norm=True)
            self.modulated = Transformer(2, width, 32, 10_000.0, modulated=True)
            self.head = nn.Linear(width, width)
            self.head.zero_init = True

    model = Model()
    for p in model.parameters():
        nn.init.constant_(p, 7.0)
    torch.manual_seed(0)
    initialize(model)

    def std(weight: torch.Tensor) -> float:
        assert abs(float(weight.detach().mean())) < 1e-3
        return float(weight.detach().std())

    assert std(model.embedding.weight) == pytest.approx(0.02, rel=0.02)
    for stack in (model.stack, model.modulated):
        for block in stack.blocks:
            assert isinstance(block, Block)
            assert isinstance(block.attention, Attention)
            assert std(block.attention.qkv.weight) == pytest.approx(1 / math.sqrt(3 * width), rel=0.02)
            assert std(block.mlp_in.weight) == pytest.approx(1 / math.sqrt(3 * width), rel=0.02)
            depth = math.sqrt(2 * len(stack.blocks))
            assert std(block.attention.out.weight) == pytest.approx(1 / math.sqrt(3 * width) / depth, rel=0.02)
            assert std(block.mlp_out.weight) == pytest.approx(1 / math.sqrt(3 * 4 * width) / depth, rel=0.02)
            if block.modulation is not None:
                assert not block.modulation.weight.any()
    assert not model.head.weight.any()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" in name:
            assert (p == 1).all(), name


def test_an_unknown_parameter_has_no_rule() -> None:
    with pytest.raises(TypeError, match="no rule for the parameters of Conv1d"):
        initialize(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)))


def test_adaln_zero_blocks_start_as_the_identity() -> None:
    block = Block(32, 8, modulated=True)
    initialize(block)
    nn.init.zeros_(block.modulation.weight)
    x_TD = torch.randn(6, 32)
    rope = rope_tables(torch.arange(6), 8, 10_000.0)
    assert torch.equal(block(x_TD, rope, Segments.from_lengths([6]), torch.randn(6, 32)), x_TD)


def test_width_must_be_heads_times_their_size() -> None:
    with pytest.raises(ValueError, match="width 30 is not a multiple of head_dim 8"):
        Transformer(1, 30, 8, 10_000.0)


def test_attention_sees_both_ways() -> None:
    stack, segments = make_stack(), Segments.from_lengths([6])
    x_TD = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    (grad_TD,) = torch.autograd.grad(stack(x_TD, segments)[2].square().sum(), x_TD)
    assert (grad_TD.abs().sum(-1) > 0).all()


@pytest.mark.parametrize(("width", "head_dim", "expected"), [(256, 64, [-1, 1, None, None]), (96, 32, [-1, 1, None])])
def test_neighbour_heads_start_by_looking_beside_them(width: int, head_dim: int, expected: list[int | None]) -> None:
    torch.manual_seed(0)
    stack = Transformer(2, width, head_dim, 10_000.0, neighbour_heads=True)
    initialize(stack)
    rope = rope_tables(torch.arange(60), head_dim, 10_000.0)
    for block in stack.blocks:
        q_THK, k_THK, _ = block.attention.qkv(torch.randn(60, width)).view(60, 3, -1, head_dim).unbind(1)
        logits_HTT = torch.einsum("thk,shk->hts", apply_rope(q_THK, *rope), apply_rope(k_THK, *rope))
        share_HTT = (logits_HTT / math.sqrt(head_dim)).softmax(-1)
        for share_TT, offset in zip(share_HTT, expected):
            inner_T = torch.arange(5, 55)
            if offset is None:
                assert float(share_TT.max()) < 0.1
            else:
                assert torch.equal(share_TT[inner_T].argmax(-1), inner_T + offset)
                assert float(share_TT[inner_T, inner_T + offset].mean()) > 0.5


def test_time_embeddings_tell_times_apart() -> None:
    embedding_TD = time_embedding(torch.tensor([0.0, 0.001, 0.5, 1.0]), 64)
    assert embedding_TD.shape == (4, 64)
    assert embedding_TD.dtype == torch.float32
    assert torch.cdist(embedding_TD, embedding_TD).add(torch.eye(4)).min() > 0.1
