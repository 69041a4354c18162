"""A stage in miniature with everything that trips sharded training, its data, and a plain PyTorch loop beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from modeling.layers import hidden
from pretrain.engine.optim import parameter_groups
from pretrain.engine.optimizer_settings import AdamWSettings, MuonSettings
from tests.pretrain.plain_muon import PlainMuon

VOCABULARY, WIDTH, ROWS = 37, 11, 6
"""Odd sizes, so that partitions get padding and cut through parameters; 6 rows divide by 1, 2, 3 and 6."""

LR = 3e-3
COMMON = {"lr": LR, "weight_decay": 0.1, "grad_clip": 0.7, "ema_decay": 0.9}
OPTIMIZER = AdamWSettings(**COMMON)
SGD = {"kind": "toy_sgd"} | COMMON
"""Section `optimizer` of an optimizer from outside (toy_sgd.py)."""
MUON = {"kind": "muon", "matrix_lr": 0.02} | COMMON
"""Section `optimizer` of Muon."""
MATRICES = {"up.weight": 3, "down.weight": 1, "aux.weight": 1}
"""Ends of the names of hidden matrices, and how many are stacked."""
OUR_NAMES = {"momentum_buffer": "velocity"}
"""Of states that torch calls otherwise."""


@dataclass
class ToyBatch:
    """Rows of one micro-batch. `uses_null`: whether the forward pass touches the parameter `null`."""

    tokens_BT: Tensor
    target_BT: Tensor
    uses_null: bool


@dataclass
class ToyOutput:
    """What a stage returns."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Block(nn.Module):
    """Norm and a two-layer perceptron with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = hidden(nn.Linear(WIDTH, 3 * WIDTH), matrices=3)
        self.down = hidden(nn.Linear(3 * WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ToyStage(nn.Module):
    """A block used twice a step, a tied and functionally used embedding, a parameter of its own, one used in some
    steps only, an auxiliary loss over another count, a buffer; if asked, its own autocast region and recomputation."""

    def __init__(self, autocast: bool = False, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block, self.last = Block(), Block()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.null = nn.Parameter(torch.randn(3, WIDTH))
        self.aux = hidden(nn.Linear(WIDTH, 5))  # so that ZeRO 1 cuts a matrix in two
        self.register_buffer("latents_mean", torch.arange(5.0) / 3)  # not what bf16 can hold
        self.autocast, self.recompute = autocast, recompute

    def forward(self, batch: ToyBatch, counts: dict[str, int]) -> ToyOutput:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            hidden = self.block(self.embedding(batch.tokens_BT))
            auxiliary = self.aux(hidden).float().square().sum() / counts["tokens"]
            again = checkpoint(self.block, hidden, use_reentrant=False) if self.recompute else self.block(hidden)
            hidden = self.last(again * self.scale)
            if batch.uses_null:
                hidden = hidden + self.null.sum(0)
            logits = F.linear(hidden, self.embedding.weight)
        losses_BT = F.cross_entropy(logits.float().flatten(0, 1), batch.tokens_BT.flatten(), reduction="none")
        main = (losses_BT * batch.target_BT.flatten()).sum() / counts["targets"]
        return ToyOutput(main + 0.3 * auxiliary, {"main": main})


def step_rows(step: int) -> ToyBatch:
    """The global batch of a step, a function of it. `null` is used in even steps only; counts differ by row."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens_BT = torch.randint(VOCABULARY, (ROWS, 7), generator=generator)
    target_BT = (torch.rand(ROWS, 7, generator=generator) < torch.linspace(0.1, 1.0, ROWS)[:, None]).float()
    target_BT[:, 0] = 1
    return ToyBatch(tokens_BT, target_BT, step % 2 == 0)


def counts_of(batch: ToyBatch) -> dict[str, int]:
    """Global counts, the loss's denominators."""
    return {"tokens": batch.tokens_BT.numel(), "targets": int(batch.target_BT.sum())}


def micro_batches(step: int, rank: int, world_size: int, accumulation: int) -> list[ToyBatch]:
    """A rank's share of a step: rows rank, rank + world_size, ..., cut into `accumulation` micro-batches."""
    rows = step_rows(step)
    mine = torch.arange(rank, ROWS, world_size).chunk(accumulation)
    return [ToyBatch(rows.tokens_BT[i], rows.target_BT[i], rows.uses_null) for i in mine]


@dataclass
class Reference:
    """What the plain loop ends with: every state by name, and per step the losses and gradient norms."""

    states: dict[str, dict[str, Tensor]]
    losses: list[float]
    norms: list[float]


class SumStage(nn.Module):
    """loss = sum of weight x numbers: a micro-batch's gradient is its numbers, which bf16 holds exactly, whatever kernel computes
    it. What comes out of a step tells how gradients are added up, and nothing else."""

    SIZES = (501, 77)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Parameter(torch.randn(size)) for size in self.SIZES)

    def forward(self, numbers: list[Tensor], counts: dict[str, int]) -> ToyOutput:
        loss = sum((p.float() * n).sum() for p, n in zip((self.first, self.second), numbers, strict=True))
        return ToyOutput(loss, {})


def sum_batches(rank: int, accumulation: int) -> list[list[Tensor]]:
    """A rank's micro-batches for a `SumStage`: numbers of bf16."""
    generator = torch.Generator().manual_seed(rank)
    return [
        [torch.randn(size, generator=generator).bfloat16().float() for size in SumStage.SIZES]
        for _ in range(accumulation)
    ]


def plain_adamw(stage: nn.Module) -> torch.optim.Optimizer:
    """torch's own, in one process."""
    groups = parameter_groups(stage, OPTIMIZER.weight_decay)
    return torch.optim.AdamW(groups, lr=LR, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)


def plain_sgd(stage: nn.Module) -> torch.optim.Optimizer:
    """torch's own, with the momentum and weight decay of `SGD`."""
    return torch.optim.SGD(parameter_groups(stage, SGD["weight_decay"]), lr=LR, momentum=0.9)


def plain_muon(stage: nn.Module) -> torch.optim.Optimizer:
    """By hand, of the blocks' weights."""
    named = dict(stage.named_parameters())
    hidden = {p: count for name, p in named.items() for end, count in MATRICES.items() if name.endswith(end)}
    return PlainMuon(stage, MuonSettings(**MUON), hidden)


def plain_training(
    num_steps: int,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = plain_adamw,
) -> Reference:
    """Optimizer, clipping and EMA by hand over whole global batches: no DeepSpeed, no ranks, no accumulation, no shards."""
    stage = ToyStage(autocast).to(dtype)
    optimizer = make_optimizer(stage)
    parameters = dict(stage.named_parameters())
    ema = {name: p.detach().clone() for name, p in parameters.items()}
    losses, norms = [], []
    for step in range(num_steps):
        batch = step_rows(step)
        batch.target_BT = batch.target_BT.to(dtype)
        for p in parameters.values():
            p.grad = torch.zeros_like(p)
        loss = stage(batch, counts_of(batch)).loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters.values(), OPTIMIZER.grad_clip)))
        losses.append(float(loss.detach()))
        optimizer.step()
        decay = min(OPTIMIZER.ema_decay, (1 + step) / (10 + step))
        for name, p in parameters.items():
            ema[name] = decay * ema[name] + (1 - decay) * p.detach()
    states: dict[str, dict[str, Tensor]] = {"weight": {name: p.detach() for name, p in parameters.items()}, "ema": ema}
    for name, p in parameters.items():
        for state, value in optimizer.state[p].items():
            if state != "step":
                states.setdefault(OUR_NAMES.get(state, state), {})[name] = value
    return Reference(states, losses, norms)
