"""One rank of a run on a cluster, on any machine: `pretrain/train.py --config dit_2b --dry-run --as-rank 0/512`.

What `textldm plan` computes for all choices, for the configuration's own and in detail. The models are on the meta device: nothing is
allocated, read or started, and no data are needed.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tabulate import tabulate

from data_pipeline.reading.streams import Lane, idle_share, rank_lanes
from pretrain.config.schema import RunConfig
from pretrain.engine.optim import EMA, WEIGHT, build_optimizer
from pretrain.engine.settings import MAX_BUCKET
from pretrain.plan.estimate import GIB, Text, activations, outline_of
from pretrain.plan.states import Parameters, sent, states

SHOWN_SHAPES = 5
TRANSIENT, ACTIVATIONS = "for a while in backward or step", "activations of a micro-batch"
PASSING = (TRANSIENT, ACTIVATIONS)
"""Kinds of memory that are not held between steps."""
NAMES = {WEIGHT: "masters", EMA: "moving average (EMA)"}


@dataclass(frozen=True)
class Group:
    """A parameter group: its label, the states of an element, and how many parameters have which shape, the largest first."""

    label: str
    states: Sequence[str]
    shapes: dict[tuple[int, ...], int]

    @property
    def elements(self) -> int:
        """Of all its parameters."""
        return sum(count * torch.Size(shape).numel() for shape, count in self.shapes.items())


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds, computes and sends.

    Attributes:
        memory: bytes on its device by kind, activations of a micro-batch among them.
        offloaded: bytes of states that lie on its host or in files instead.
        sent: bytes that it sends in a step, by what they are.
        buckets: in how many pieces gradients are reduced.
    """

    config: RunConfig
    rank: int
    ranks: int
    text: Text
    memory: dict[str, int]
    offloaded: int
    groups: list[Group]
    lanes: list[Lane]
    micro_batch_rows: int
    micro_batches: int
    sent: dict[str, float]
    buckets: int


def plan_rank(config: RunConfig, rank: int, ranks: int, text: Text, vocab_size: int = 0) -> RankPlan:
    """The plan of a rank. Raises: UserError for a stage without an outline."""
    outline = outline_of(config, torch.device("meta"), vocab_size)
    optimizer = build_optimizer(outline.trained, config.optimizer)
    groups = [
        Group(group["label"], optimizer.states_of(group), _shapes(group["params"])) for group in optimizer.param_groups
    ]
    parameters, train = Parameters.under(optimizer), config.train
    bf16, offload = _is_bf16(config), train.offload_optimizer != "none"
    rows, micro_batch = config.data.rank_rows(ranks), config.data.micro_batch(ranks)
    found, on_device = (
        states(parameters, train.zero_stage, ranks, bf16, accumulates=micro_batch < rows, offload=away)
        for away in (False, offload)
    )
    fixed, each = activations(outline, text, bf16, train.activation_checkpointing)
    shares = parameters.shares(on_device.states, train.zero_stage)
    memory = {
        "weights": on_device.weights,
        "gradients": on_device.gradients,
        **{NAMES.get(name, name): size for name, size in shares.items()},
        "buckets and whole small parameters": on_device.buffers,
        TRANSIENT: on_device.transient,
        "frozen models": outline.frozen_bytes(bf16),
        ACTIVATIONS: fixed + micro_batch * each,
    }
    return RankPlan(
        config, rank, ranks, text, memory, found.states - on_device.states, groups,
        rank_lanes(config.data.streams, config.data.rows_per_step, rank, ranks), micro_batch, rows // micro_batch,
        sent(parameters, train.zero_stage, ranks, bf16, rows // micro_batch), -(-parameters.elements // MAX_BUCKET),
    )  # fmt: skip


def _shapes(parameters: Sequence[torch.Tensor]) -> dict[tuple[int, ...], int]:
    counts = Counter(tuple(p.shape) for p in parameters)
    return dict(sorted(counts.items(), key=lambda item: -item[1] * torch.Size(item[0]).numel()))


def report(plan: RankPlan) -> str:
    """The plan in words and tables."""
    config, train = plan.config, plan.config.train
    memory = [(kind, f"{size / GIB:.3f}") for kind, size in plan.memory.items() if size]
    memory.append(("together", f"{sum(plan.memory.values()) / GIB:.3f}"))
    sent = [(kind, f"{size / 1e9:.3f}") for kind, size in plan.sent.items() if size]
    groups = [
        (group.label, sum(group.shapes.values()), f"{group.elements:,}", ", ".join(group.states), _told(group.shapes))
        for group in plan.groups
    ]
    every = train.activation_checkpointing
    recomputed = "no block" if not every else "every block" if every == 1 else f"one block in {every}"
    device = _table(("memory of the device", "GiB"), memory)
    if plan.offloaded:
        device += f"\non the host ({train.offload_optimizer}): states, {plan.offloaded / GIB:.3f} GiB"
    network = "nothing is sent: there is no other rank"
    if sent:
        network = _table(("sent in a step", "GB"), sent)
        network += f"\ngradients are reduced in {plan.buckets} bucket(s) of at most {MAX_BUCKET:,} elements"
    return "\n\n".join(
        (
            f"stage {config.stage} as rank {plan.rank} of {plan.ranks}: ZeRO {train.zero_stage},"
            f" {'bf16' if _is_bf16(config) else 'fp32'}, {recomputed} recomputed\n{_rows(plan)}",
            device,
            tabulate(
                groups, ("group", "parameters", "elements", "states", "shapes"), tablefmt="plain", disable_numparse=True
            ),
            network,
            f"Computed: nothing was allocated or started. Rows of {plan.text.row_tokens:,} tokens and windows of"
            f" {plan.text.window_tokens:,} are those of data.path, where it is prepared, else assumed; so are frozen models of the default"
            " shape, attention by a kernel, and no torch.compile, which keeps less. A device's context and its allocator take 6 % besides.",
        )
    )


def _is_bf16(config: RunConfig) -> bool:
    """As on a GPU."""
    return config.train.precision != "fp32" and config.train.zero_stage > 0


def _table(headers: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    return tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=("left", "right"))


def _told(shapes: dict[tuple[int, ...], int]) -> str:
    told = [f"{count} x {' x '.join(map(str, shape)) or 'a number'}" for shape, count in shapes.items()]
    return "; ".join(told[:SHOWN_SHAPES]) + f"; {len(told) - SHOWN_SHAPES} more" * (len(told) > SHOWN_SHAPES)


def _rows(plan: RankPlan) -> str:
    """Which rows of a step are this rank's."""
    data = plan.config.data
    real = sum(lane.num_rows for lane in plan.lanes if lane.stream is not None)
    streams = sorted({lane.stream for lane in plan.lanes if lane.stream is not None})
    which = f", of stream(s) {', '.join(map(str, streams[:8]))}{' ...' * (len(streams) > 8)}" if streams else ""
    filler = data.rank_rows(plan.ranks) - real
    idle = idle_share(data.rows_per_step, plan.ranks)
    return (
        f"{real} of a step's {data.rows_per_step} rows{which}"
        + f", and {filler} of filler" * bool(filler)
        + f"; {plan.micro_batches} micro-batch(es) of {plan.micro_batch_rows} row(s)"
        + f"; of all ranks' rows {idle:.0%} are filler" * bool(idle)
    )
