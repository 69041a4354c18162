"""One rank training the real stages in miniature, under several shardings or without DeepSpeed at all.

Started by engine_launch.py with the name of the jobs' file.

A job is {"name", "config", "zero_stage" (null: a plain PyTorch loop), "accumulation", "steps", "optimizer" (adamw)}; rank 0 writes all
states to <name>.safetensors and, for stage vae, a checkpoint to the config's run folder.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.loader import TrainLoader
from modeling.layers import whole
from modeling.repa import RepaHead
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.config.load import parse_config
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import Engine, EngineSettings, in_pieces
from pretrain.engine.muon import hidden_matrices
from pretrain.engine.optim import parameter_groups
from pretrain.engine.optimizer_settings import AdamWSettings, MuonSettings
from pretrain.engine.pieces import weights_on
from pretrain.ranks.distributed import Topology, init_distributed
from pretrain.runs.record import RunRecord
from pretrain.stages.base import Stage
from pretrain.stages.build import build_stage, measure
from tests.pretrain.engine_states import gather_full
from tests.pretrain.plain_muon import PlainMuon

FEATURE_DIM = 24
COMMON = {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.1, "grad_clip": 1.0, "ema_decay": 0.9}
OPTIMIZERS = {"adamw": AdamWSettings(**COMMON), "muon": MuonSettings(kind="muon", matrix_lr=5e-3, **COMMON)}
"""A large eps: attention's key bias has no gradient but rounding errors, which Adam would blow up to full steps. A small
matrix_lr: Newton-Schulz magnifies the rounding errors of weak directions up to 485 times, and by this rate they enter the weights."""


@dataclass(frozen=True)
class TableTarget:
    """A direction for every token, whatever stands around it."""

    table_VF: Tensor
    feature_dim: int = FEATURE_DIM

    def directions(self, batch: Batch) -> Tensor:
        return nn.functional.normalize(self.table_VF[batch.tokens_T], dim=-1)


def make_stage(config: RunConfig, settings: EngineSettings) -> Stage:
    """The configured stage, with random weights everywhere (zero ones hide errors) and, for the VAE, a REPA target; at ZeRO 3 in pieces
    from the first.
    """
    torch.manual_seed(0)
    manifest = Manifest.load(config.data.path)
    measure(config, manifest, torch.device("cpu"))
    device = torch.device("cpu")
    with in_pieces(settings):
        stage = build_stage(config, manifest, device)
        if config.stage == "vae":
            table_VF = torch.randn(stage.vae.config.vocab_size, FEATURE_DIM, generator=torch.Generator().manual_seed(1))
            stage.target = TableTarget(table_VF)
            with weights_on(device):
                stage.repa = RepaHead(stage.vae.config.width, FEATURE_DIM)
    for p in stage.parameters():
        with torch.no_grad(), whole(p):
            if not p.any():
                p.normal_(std=0.05)
    return stage


def counts_of(stage: Stage, batches: list[Batch]) -> dict[str, int]:
    """Token counts of the batches together."""
    counts = [stage.token_counts(batch) for batch in batches]
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def steps_of(config: RunConfig, rank: int, world_size: int, micro_batch_rows: int, num_steps: int) -> list[list[Batch]]:
    """A rank's micro-batches of the first steps."""
    data = config.data
    loader = TrainLoader(
        data.path, None, seed=config.train.seed, streams=data.streams, rows_per_step=data.rows_per_step,
        micro_batch_rows=micro_batch_rows, split=data.split, rank=rank,
        world_size=world_size, workers=0,
    )  # fmt: skip
    with loader:
        return [loader.next_step() for _ in range(num_steps)]


def plain_optimizer(stage: Stage, settings: AdamWSettings) -> torch.optim.Optimizer:
    """torch's AdamW, or Muon by hand."""
    if isinstance(settings, MuonSettings):
        return PlainMuon(stage, settings, hidden_matrices(stage))
    groups = parameter_groups(stage, settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def train_plain(job: dict[str, Any], config: RunConfig) -> dict[str, Tensor]:
    """The whole global batch at once, in one process: torch's clipping, the EMA by hand."""
    stage, num_steps = make_stage(config, EngineSettings(zero_stage=0)), job["steps"]
    settings = OPTIMIZERS[job.get("optimizer", "adamw")]
    optimizer = plain_optimizer(stage, settings)
    ema = {name: p.detach().clone() for name, p in stage.named_parameters()}
    for step, batches in enumerate(steps_of(config, 0, 1, config.data.rows_per_step, num_steps)):
        stage.step = step
        stage.zero_grad()
        for batch in batches:
            stage(batch, counts_of(stage, batches)).loss.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), settings.grad_clip)
        optimizer.step()
        for name, p in stage.named_parameters():
            ema[name].lerp_(p.detach(), 1 - settings.ema_decay_at(step))
    states = {f"weight/{name}": p.detach() for name, p in stage.named_parameters()}
    states |= {f"ema/{name}": tensor for name, tensor in ema.items()}
    for name, p in stage.named_parameters():
        states |= {f"{state}/{name}": value for state, value in optimizer.state[p].items() if state != "step"}
    return states


def train_sharded(job: dict[str, Any], config: RunConfig, topology: Topology) -> dict[str, Tensor]:
    """The same through the engine; an evaluation in between must leave no trace."""
    num_steps, accumulation, optimizer = job["steps"], job["accumulation"], OPTIMIZERS[job.get("optimizer", "adamw")]
    sharding = EngineSettings(zero_stage=job["zero_stage"], accumulation_steps=accumulation)
    stage = make_stage(config, sharding)
    engine = Engine(stage, sharding, optimizer, topology)
    rows = config.data.rows_per_step
    micro_batch_rows = rows // topology.world_size // accumulation
    every_row = steps_of(config, 0, 1, rows, num_steps)
    for step, batches in enumerate(steps_of(config, topology.rank, topology.world_size, micro_batch_rows, num_steps)):
        stage.step = step
        counts = counts_of(stage, every_row[step])
        for i, batch in enumerate(batches):
            engine.forward_backward(batch, counts, last=i == len(batches) - 1)
        engine.step(step, optimizer.lr)
        if step == 0:  # every step that follows would show a trace
            with engine.ema_weights():
                engine.evaluate(batches[0], counts)
    if config.stage == "vae":
        manifest = Manifest.load(config.data.path)
        extra = RunRecord.of_run(config, manifest).extra()
        CheckpointWriter(config.run_folder, topology).save(num_steps, engine, extra, blocking=True)
    states = gather_full(engine)
    engine.close()
    return states


def main(argv: list[str]) -> int:
    """Run the jobs of the JSON file that is the only argument."""
    path = Path(argv[0])
    topology = init_distributed(timeout_s=60)
    for job in json.loads(path.read_text()):
        config = parse_config(job["config"], "job")
        plain = job["zero_stage"] is None
        states = train_plain(job, config) if plain else train_sharded(job, config, topology)
        if topology.is_main:
            save_file({name: t.contiguous() for name, t in states.items()}, path.parent / f"{job['name']}.safetensors")
            (path.parent / f"{job['name']}.json").write_text("{}")
    return 0
