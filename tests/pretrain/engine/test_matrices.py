"""Who computes which matrix, and what is sent: for every way in which ZeRO shares out parameters."""

import pytest
import torch
from torch import nn

from pretrain.engine import matrices as module
from pretrain.engine.held import Held
from pretrain.engine.matrices import Matrix, WholeMatrices, choose_owners, parts_of, stacked

BLOCK = {"qkv": (24, 8, 3), "out": (8, 8, 1), "mlp_in": (32, 8, 1), "mlp_out": (8, 32, 1)}
SHAPES = {f"{layer}.{name}": shape for layer in range(12) for name, shape in BLOCK.items()}
"""Rows, columns and number of stacked matrices by name."""
MATRICES = [
    matrix for name, (rows, columns, count) in SHAPES.items() for matrix in stacked(name, (rows, columns), count)
]
TOTAL = sum(matrix.numel for matrix in MATRICES)


def everything(num_ranks: int) -> list[list[Held]]:
    """ZeRO 0: every rank holds every parameter, in a flat of its own."""
    held = [Held(name, 0, rows * columns, flat, 0) for flat, (name, (rows, columns, _)) in enumerate(SHAPES.items())]
    return [held] * num_ranks


def stretches(num_ranks: int) -> list[list[Held]]:
    """ZeRO 1 and 2: the parameters one behind the other, cut into equal stretches."""
    size = -(-TOTAL // num_ranks)
    found: list[list[Held]] = []
    for rank in range(num_ranks):
        begin, end, position = rank * size, (rank + 1) * size, 0
        found.append([])
        for name, (rows, columns, _) in SHAPES.items():
            low, high = max(begin, position), min(end, position + rows * columns)
            if low < high:
                found[-1].append(Held(name, low - position, high - low, 0, low - begin))
            position += rows * columns
    return found


def pieces(num_ranks: int) -> list[list[Held]]:
    """ZeRO 3: every parameter cut into equal pieces, the last one shorter."""
    found = []
    for rank in range(num_ranks):
        offset, mine = 0, []
        for name, (rows, columns, _) in SHAPES.items():
            size = -(-rows * columns // num_ranks)
            numel = min(size, rows * columns - rank * size)
            if numel > 0:
                mine.append(Held(name, rank * size, numel, 0, offset))
            offset += size
        found.append(mine)
    return found


LAYOUTS = {"ZeRO 0": everything, "ZeRO 1, 2": stretches, "ZeRO 3": pieces}


def whole(layout: str, num_ranks: int, rank: int = 0) -> WholeMatrices:
    return WholeMatrices(MATRICES, LAYOUTS[layout](num_ranks), [], rank, torch.device("cpu"))


def test_stacked_matrices_lie_on_top_of_one_another():
    weight = torch.arange(24.0).view(6, 4)
    first, second, third = stacked("w", (6, 4), 3)
    assert second == Matrix("w", 8, 2, 4)
    flat = weight.view(-1)
    assert [flat[m.start : m.start + m.numel].view(m.rows, m.columns).tolist() for m in (first, second, third)] == [
        chunk.tolist() for chunk in weight.chunk(3)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rank_computes_more_than_its_share_and_one_matrix(layout, num_ranks):
    shared = whole(layout, num_ranks)
    loads = [sum(matrix.work for matrix in shared.owned(rank)) for rank in range(num_ranks)]
    assert sum(loads) == sum(matrix.work for matrix in MATRICES)
    assert max(loads) <= sum(loads) / num_ranks + max(matrix.work for matrix in MATRICES)
    assert min(loads) > 0


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_what_is_sent_is_what_the_docs_say(num_ranks):
    ranks = range(num_ranks)
    replicated, cut = whole("ZeRO 0", num_ranks), whole("ZeRO 3", num_ranks)
    assert sum(replicated.sent(rank) for rank in ranks) == TOTAL * (num_ranks - 1)
    assert 0.7 <= sum(cut.sent(rank) for rank in ranks) / max(1, 2 * TOTAL * (1 - 1 / num_ranks)) <= 1 or num_ranks == 1
    stretched = whole("ZeRO 1, 2", num_ranks)
    moved = [one for one in stretched.exchanges if one.gathered]
    assert len(moved) <= num_ranks - 1
    assert sum(stretched.sent(rank) for rank in ranks) <= 2 * sum(one.matrix.numel for one in moved)


def test_a_rank_that_holds_all_the_work_gives_some_away():
    matrices = [Matrix(str(n), 0, 8, 8) for n in range(8)]
    parts = [[parts_of(m, [Held(m.name, 0, 64, 0, 0)] if rank == 0 else []) for m in matrices] for rank in range(4)]
    owners = choose_owners(matrices, parts)
    assert max(owners.count(rank) for rank in range(4)) <= 3


@pytest.mark.parametrize("room", [1, 3000, 1 << 24])
def test_alone_every_matrix_is_mapped_by_itself(monkeypatch: pytest.MonkeyPatch, room: int):
    monkeypatch.setattr(module, "ROUND_ELEMENTS", room)
    torch.manual_seed(0)
    counts = {
        nn.Parameter(torch.randn(96, 32)): 3,
        nn.Parameter(torch.randn(32, 40)): 1,
        nn.Parameter(torch.randn(32, 32)): 1,
    }
    values = [p.detach().clone().view(-1) for p in counts]
    WholeMatrices.alone(counts).map_(list(counts), values, lambda stack: stack.flip(-1) + stack.shape[1])
    for (p, count), value in zip(counts.items(), values, strict=True):
        expected = torch.cat([matrix.flip(-1) + len(matrix) for matrix in p.detach().chunk(count)])
        assert torch.equal(value.view(p.shape), expected)
