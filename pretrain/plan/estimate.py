"""The plan of a run on a cluster: arithmetic over the configuration's own models. Nothing is measured here but shapes.

Times: matrix products at the sustained rate that is given, else 40 % of the device's peak; what goes between GPUs at the interconnect's
rate. At ZeRO 0 to 2 our settings do not overlap communication with the backward pass, at 3 DeepSpeed does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.reading.streams import idle_share, largest_micro_batch
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.plan.activations import trace
from pretrain.plan.reliability import DAY_S, between_failures_s, daly_s, goodput
from pretrain.plan.states import Parameters, sent_bytes, states
from pretrain.stages.outline import Outline, Windows

GIB = 1 << 30
RESERVE = 0.06
"""Of a device's memory: CUDA's context, NCCL's buffers and what the allocator cannot use."""
SUSTAINED = 0.4
"""Share of a device's peak that training reaches, where nobody measured it."""
HOST_COPY = 20e9
"""Bytes a second from a device to its host: for so long training stands still when a checkpoint is taken."""


@dataclass(frozen=True)
class Hardware:
    """The cluster.

    Attributes:
        memory_bytes: of a GPU; peak_tflops: its dense peak in bf16; sustained_tflops: measured, else None.
        interconnect: bytes a second that a GPU sends to other nodes; within_node: to its neighbours.
        failures: per 1,000 node-days; restart_s: from a failure to training again.
        storage: bytes a second of the shared storage, all nodes together.
        price: of a GPU hour.
    """

    nodes: int
    gpus_per_node: int
    memory_bytes: float
    peak_tflops: float = 989.0
    sustained_tflops: float | None = None
    interconnect: float = 50e9
    within_node: float = 300e9
    failures: float = 3.8
    restart_s: float = 300.0
    storage: float = 5e9
    price: float = 0.0

    @property
    def ranks(self) -> int:
        """W."""
        return self.nodes * self.gpus_per_node

    @property
    def rate(self) -> float:
        """FLOP/s that a GPU sustains."""
        return 1e12 * (self.sustained_tflops or SUSTAINED * self.peak_tflops)

    @property
    def bandwidth(self) -> float:
        """Bytes a second of a ring over all ranks: its slowest link's."""
        return self.interconnect if self.nodes > 1 else self.within_node


@dataclass(frozen=True)
class Text:
    """What is read: tokens of a row, of a mean window, and in all (0: not known)."""

    row_tokens: int = PrepareOptions.row_tokens
    window_tokens: int = 512
    tokens: int = 0

    def windows(self, rows: int) -> Windows:
        """Of so many rows: windows of the mean length."""
        count, rest = divmod(rows * self.row_tokens, self.window_tokens)
        return Windows([self.window_tokens] * count + [rest] * (rest > 0))


def text_of(
    config: RunConfig, row_tokens: int | None = None, window_tokens: int | None = None, tokens: float | None = None
) -> tuple[Text, int]:
    """What is read, and the tokenizer's size (0: not known): as given, else of the prepared data, if they are there. Raises: UserError."""
    row, window, vocabulary = row_tokens, window_tokens, 0
    if (Path(config.data.path) / "manifest.json").is_file():
        manifest = Manifest.load(config.data.path)
        shards = manifest.splits["train"]
        row, vocabulary = row or manifest.row_tokens, manifest.tokenizer.vocab_size
        tokens = tokens or sum(shard.tokens for shard in shards)
        window = window or max(1, sum(s.tokens for s in shards) // max(1, sum(s.windows for s in shards)))
    row, window = row or Text.row_tokens, window or Text.window_tokens
    if not 0 < window <= row:
        raise UserError(f"--window-tokens is {window} and --row-tokens {row}; expected windows that fit into a row")
    return Text(row, window, int(tokens or 0)), vocabulary


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage with a choice of recomputation: memory of a rank and time of a step. `micro_batch_rows` 0: it does not fit."""

    zero_stage: int
    activation_checkpointing: int
    weights: int
    gradients: int
    states: int
    buffers: int
    frozen: int
    row_bytes: int
    fixed_bytes: int
    micro_batch_rows: int
    memory: float = 0.0
    compute_s: float = 0.0
    sent_bytes: float = 0.0
    communication_s: float = 0.0
    step_s: float = 0.0


@dataclass(frozen=True)
class Plan:
    """All that `textldm plan` tells."""

    parameters: int
    frozen_parameters: int
    flops_per_token: float
    tokens_per_step: int
    ranks: int
    rows_per_rank: int
    idle: float
    choices: list[Choice]
    best: Choice | None
    tokens_per_s: float = 0.0
    days: float = 0.0
    goodput: float = 0.0
    passes: float | None = None
    checkpoint_bytes: int = 0
    checkpoint_stall_s: float = 0.0
    checkpoint_write_s: float = 0.0
    checkpoint_interval_s: float = 0.0
    checkpoint_every: int = 0
    hours_between_failures: float = 0.0
    shard_bytes: float = 0.0
    cache_bytes: dict[str, float] = field(default_factory=dict)
    gpu_hours: float = 0.0
    cost: float = 0.0

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """The configuration's keys that follow from it. Raises: UserError if nothing fits."""
        if self.best is None:
            raise UserError(no_fit(self.choices))
        train = {
            "zero_stage": self.best.zero_stage,
            "activation_checkpointing": self.best.activation_checkpointing,
            "checkpoint_every": self.checkpoint_every,
        }
        return {"data": {"micro_batch_rows": self.best.micro_batch_rows}, "train": train}


def outline_of(config: RunConfig, device: torch.device, vocab_size: int = 0) -> Outline:
    """A stage's outline. Raises: UserError for a stage that has none."""
    own = stage_kind(config.stage).load("outline")
    if own is None:
        raise UserError(f"stage {config.stage} cannot be planned: its StageKind names no outline (docs/extending.md)")
    return own(config, device, vocab_size)


def make_plan(config: RunConfig, hardware: Hardware, text: Text, vocab_size: int = 0) -> Plan:
    """The plan. Raises: UserError."""
    outline = outline_of(config, torch.device("meta"), vocab_size)
    parameters = Parameters.of(outline.trained, config.optimizer)
    bf16 = config.train.precision != "fp32"
    rows = config.data.rows_per_step
    rank_rows = config.data.rank_rows(hardware.ranks)
    row = text.windows(1)
    flops_per_token = outline.flops(row) / row.num_tokens
    frozen = outline.frozen_bytes(bf16)
    traces = {every: activations(outline, text, bf16, every) for every in (0, 1)}
    choices = []
    for stage in range(1 if bf16 else 0, 4):
        for every, (fixed, each) in traces.items():
            choices.append(_choice(config, hardware, parameters, stage, every, fixed, each, frozen, bf16, rank_rows))
    choices = [_timed(choice, hardware, parameters, outline, text, bf16, rank_rows) for choice in choices]
    fitting = [choice for choice in choices if choice.micro_batch_rows]
    best = min(fitting, key=lambda choice: (choice.step_s, choice.zero_stage), default=None)
    tokens_per_step = rows * text.row_tokens
    plan: dict[str, Any] = {
        "parameters": parameters.elements,
        "frozen_parameters": outline.frozen_bytes(bf16=False) // 4,
        "flops_per_token": flops_per_token,
        "tokens_per_step": tokens_per_step,
        "ranks": hardware.ranks,
        "rows_per_rank": rank_rows,
        "idle": idle_share(rows, hardware.ranks),
        "choices": choices,
        "best": best,
        "checkpoint_bytes": parameters.state_bytes,
        "shard_bytes": float(text.tokens * (4 if outline.vocab_size > 65_536 else 2)),
        "cache_bytes": _cache_bytes(text.tokens, outline.features),
    }
    if best is not None:
        plan |= _whole(config, hardware, parameters, best, tokens_per_step, text)
    return Plan(**plan)


def activations(outline: Outline, text: Text, bf16: bool, every: int) -> tuple[int, int]:
    """Bytes of activations that do not depend on the rows, and those of a row: two passes, a straight line."""
    one, two = (trace(outline, text.windows(rows), bf16, every).peak_bytes for rows in (1, 2))
    return max(0, 2 * one - two), two - one


def _choice(
    config: RunConfig, hardware: Hardware, parameters: Parameters, stage: int, every: int, fixed: int, each: int,
    frozen: int, bf16: bool, rank_rows: int,
) -> Choice:  # fmt: skip
    room = hardware.memory_bytes * (1 - RESERVE)
    offload = config.train.offload_optimizer != "none" and stage > 0
    for rows in (largest_micro_batch(rank_rows, at_most) for at_most in range(rank_rows, 0, -1)):
        found = states(parameters, stage, hardware.ranks, bf16, accumulates=rows < rank_rows, offload=offload)
        memory = found.total + frozen + fixed + rows * each
        if memory <= room:
            break
    else:
        rows = 0
    return Choice(
        stage, every, found.weights, found.gradients, found.states, found.buffers + found.transient, frozen, each, fixed,
        rows, float(memory),
    )  # fmt: skip


def _timed(
    choice: Choice, hardware: Hardware, parameters: Parameters, outline: Outline, text: Text, bf16: bool, rank_rows: int
) -> Choice:
    """With the times of a step: what is recomputed is another forward pass, a third of the FLOPs."""
    micro_batches = rank_rows // max(1, choice.micro_batch_rows)
    flops = outline.flops(text.windows(1)) * rank_rows * (4 / 3 if choice.activation_checkpointing else 1)
    sent = sent_bytes(parameters, choice.zero_stage, hardware.ranks, bf16, micro_batches)
    compute_s, communication_s = flops / hardware.rate, sent / hardware.bandwidth
    overlapped = choice.zero_stage == 3
    step_s = max(compute_s, communication_s) if overlapped else compute_s + communication_s
    times = {
        "compute_s": compute_s, "sent_bytes": sent, "communication_s": communication_s, "step_s": step_s,
    }  # fmt: skip
    return Choice(**(asdict(choice) | times))


def _whole(
    config: RunConfig, hardware: Hardware, parameters: Parameters, best: Choice, tokens_per_step: int, text: Text
) -> dict[str, Any]:
    """The whole run: days, failures, checkpoints, cost."""
    held = parameters.state_bytes / (hardware.ranks if best.zero_stage else hardware.gpus_per_node)
    stall_s, write_s = held / HOST_COPY, parameters.state_bytes / hardware.storage
    between_s = between_failures_s(hardware.nodes, hardware.failures) if hardware.failures else math.inf
    if math.isfinite(between_s):
        interval_s = max(daly_s(max(stall_s, 1e-3), between_s), write_s, best.step_s)
        useful = goodput(interval_s, stall_s, hardware.restart_s + write_s, between_s)
    else:
        interval_s, useful = config.train.checkpoint_every * best.step_s, 1.0
    seconds = config.train.steps * best.step_s / max(useful, 1e-9)
    gpu_hours = seconds / 3600 * hardware.ranks
    total = config.train.steps * tokens_per_step
    return {
        "tokens_per_s": tokens_per_step / best.step_s,
        "days": seconds / DAY_S,
        "goodput": useful,
        "passes": total / text.tokens if text.tokens else None,
        "checkpoint_stall_s": stall_s,
        "checkpoint_write_s": write_s,
        "checkpoint_interval_s": interval_s,
        "checkpoint_every": max(1, round(interval_s / best.step_s)),
        "hours_between_failures": between_s / 3600,
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * hardware.price,
    }


def _cache_bytes(tokens: int, features: int) -> dict[str, float]:
    """Of the feature cache, by codec: every feature in 16 bits, or the leading directions in few bits and a scale a token."""
    if not features or not tokens:
        return {}
    codecs = {"exact, 16 bits": 2 * features, "rank 256, 4 bits": 256 / 2 + 2, "rank 128, 4 bits": 128 / 2 + 2}
    return {name: tokens * float(size) for name, size in codecs.items()}


def no_fit(choices: Sequence[Choice]) -> str:
    """What to say where not even a row fits."""
    least = min(choices, key=lambda choice: choice.memory)
    return (
        f"no choice fits: ZeRO {least.zero_stage} with every block recomputed needs {least.memory / GIB:.1f} GiB a GPU for"
        " one row; take more GPUs (--nodes), or train.offload_optimizer=cpu, or shorter rows (textldm prepare --row-tokens)"
    )
