"""A training session: all that the loop of pretrain/train.py works with, built in one place and in a fixed order:

data manifest -> newest checkpoint, what may differ from it -> stage -> engine -> restored state -> telemetry, loader
"""

import json
import os
import platform
import shutil
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import key
from data_pipeline.core.storage import atomic_write
from data_pipeline.format.manifest import FeatureManifest, Manifest
from data_pipeline.reading.loader import TrainLoader
from pretrain.checkpoint.find import discard_after, had_checkpoints, newest_complete, saved_steps
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import restore
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.config.load import check_ranks, micro_batch_size, refuse_changes, resume_differences
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import Engine, EngineSettings
from pretrain.engine.schedule import learning_rate
from pretrain.faults.signals import Signals
from pretrain.faults.spikes import SpikeGuard
from pretrain.faults.watchdog import Watchdog
from pretrain.ranks.distributed import Topology, barrier
from pretrain.stages.base import Stage
from pretrain.stages.build import build_stage
from pretrain.stages.dit import DiTRun
from pretrain.stages.latent_space import vae_fingerprint
from pretrain.telemetry.record import Telemetry


@dataclass
class Session:
    """The parts of a run in progress; `step` counts finished steps, so the next one has this number."""

    config: RunConfig
    topology: Topology
    run: Path
    manifest: Manifest
    inputs: dict[str, str]
    stage: Stage
    engine: Engine
    loader: TrainLoader
    writer: CheckpointWriter
    guard: SpikeGuard
    telemetry: Telemetry
    signals: Signals
    watchdog: Watchdog
    step: int
    saved_step: int
    rewinds: int = 0

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`."""
        schedule = self.config.schedule
        return learning_rate(step, self.config.optimizer.lr, schedule, self.config.train.steps)

    def save(self, blocking: bool = False) -> None:
        """Write a checkpoint of the state after `step` steps, unless there is one. Collective."""
        if self.step == self.saved_step and self.writer.settle():
            return
        blocking = blocking or not self.config.train.checkpoint_async
        stalled_s = self.writer.save(self.step, self.engine, extra=self._extra(), blocking=blocking)
        self.saved_step = self.step
        self.telemetry.event("checkpoint", step=self.step, stalled_s=stalled_s, blocking=blocking)

    def rewind(self) -> bool:
        """Go on behind the bad steps with the newest checkpoint before them; False if there is none. Collective.

        The same rows would end the same way, so all rows between that checkpoint and here are left out.
        """
        self.writer.settle()  # whether or not it failed: what is complete counts
        bad_from = self.guard.state()["skipped_steps"][0]
        earlier = [step for step in saved_steps(self.run) if step <= bad_from]
        barrier()  # every rank has looked before rank 0 deletes
        if not earlier:
            return False
        discard_after(self.run, max(earlier), self.topology)
        path = newest_complete(self.run, self.topology)
        if path is None:
            return False
        restored = restore(path, self.engine)
        self.guard.load(restored.extra["guard"])
        self.telemetry.load(restored.extra["telemetry"])
        self.rewinds += 1
        left_out = (restored.step, self.step - 1)
        self.loader.close()
        self.loader = open_loader(self.config, self.topology, self.step)
        self.telemetry.event("rewind", step=self.step, checkpoint=path.name, left_out=left_out)
        self.telemetry.say(f"rewound to {path.name}; rows of steps {left_out[0]} to {left_out[1]} are left out")
        self.save(blocking=True)
        return True

    def close(self) -> None:
        """End in order; only after success, because it waits for the other ranks."""
        self.writer.wait()
        self.telemetry.event("end", step=self.step)
        self.telemetry.close()
        self.engine.close()

    def _extra(self) -> dict[str, Any]:
        return {
            "config": self.config.model_dump(mode="json"),
            "data_fingerprint": self.manifest.fingerprint,
            "inputs": self.inputs,
            "tokenizer_sha256": self.manifest.tokenizer.sha256,
            "guard": self.guard.state(),
            "telemetry": self.telemetry.state(),
            "rewinds": self.rewinds,
        }


def open_session(
    config: RunConfig, topology: Topology, stack: ExitStack, allow_change: Collection[str] = (), fresh: bool = False
) -> Session:
    """Build everything and resume the newest complete checkpoint of the run folder, if there is one. Collective.

    With `fresh`, an existing run folder is put aside, once the inputs are known to be there.
    What must not survive an error (signal handlers, threads) is registered with `stack`. Raises: UserError.
    """
    train, run = config.train, config.run_folder
    check_ranks(config, topology.world_size)
    manifest, inputs = Manifest.load(config.data.path), fingerprints(config)
    if train.eval_every and not manifest.splits["heldout"]:
        raise UserError(
            f"{config.data.path} has no held-out split, which train.eval_every={train.eval_every} evaluates: set"
            " train.eval_every=0, or prepare the data again with --heldout-fraction 0.005"
        )
    if fresh:
        start_over(run, topology)
    signals = stack.enter_context(Signals())
    watchdog = stack.enter_context(Watchdog(train.watchdog_s, run, topology.rank, topology.hostname))
    signals.on_first = lambda: watchdog.end_within(train.grace_s)

    found = newest_complete(run, topology)
    earlier = read_manifest(found).extra if found else None
    if earlier is None and had_checkpoints(run):
        raise UserError(
            f"{run} had checkpoints, but none of them is complete any more; start over with --fresh, or restore them"
        )
    differences = []
    if earlier:
        if earlier["data_fingerprint"] != manifest.fingerprint:
            raise UserError(
                f"{run} cannot resume: its data's fingerprint was {earlier['data_fingerprint'][:16]}, that of"
                f" {config.data.path} is {manifest.fingerprint[:16]}. Set data.path back, or name another folder with"
                " --run"
            )
        differences = resume_differences(earlier["config"], config)
        refuse_changes(differences, allow_change, run)
        refuse_other_inputs(earlier["inputs"], inputs, allow_change, run)

    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(key(train.seed, "initial weights") % 2**63)  # every rank builds the same weights
    stage = build_stage(config, topology.device)
    engine = Engine(stage, engine_settings(config, topology), config.optimizer, topology)
    restored = restore(found, engine) if found else None
    step = restored.step if restored else 0

    guard = SpikeGuard(train.spike_sigmas, train.spike_window, train.max_skips, train.skip_window)
    if earlier:
        guard.load(earlier["guard"])
    telemetry = Telemetry(
        run,
        config,
        topology,
        row_tokens=manifest.row_tokens,
        stage=stage,
        precision=engine.settings.precision,
        start_step=step,
        state=earlier and earlier["telemetry"],
    )
    writer = CheckpointWriter(run, topology, train.keep_last, train.keep_every, train.timeout_s)
    writer.prepare(engine)  # host buffers before the first save, which would otherwise stall for them
    loader = open_loader(config, topology, step)
    session = Session(
        config=config, topology=topology, run=run, manifest=manifest, inputs=inputs, stage=stage, engine=engine, loader=loader,
        writer=writer, guard=guard, telemetry=telemetry, signals=signals, watchdog=watchdog, step=step,
        saved_step=step if found else -1, rewinds=earlier["rewinds"] if earlier else 0,
    )  # fmt: skip
    stack.callback(lambda: session.loader.close())
    if topology.is_main:
        with atomic_write(run / "config.json") as file:
            file.write(config.model_dump_json(indent=2).encode() + b"\n")
    telemetry.event(
        "start", step=step, ranks=topology.world_size, python=platform.python_version(), torch=torch.__version__
    )
    telemetry.say(describe(session))
    if found:
        telemetry.say(f"resuming {found} at step {step}")
    for change in differences:
        telemetry.say(f"changed since then: {change.key} was {json.dumps(change.old)}, is {json.dumps(change.new)}")
    return session


def fingerprints(config: RunConfig) -> dict[str, str]:
    """What a run reads besides tokens, by the key that names it: a feature cache, or the VAE's checkpoint."""
    found = {}
    if features := config.features_folder():
        found["repa.features"] = FeatureManifest.load(features).fingerprint
    if isinstance(config, DiTRun):
        found["model.vae"] = vae_fingerprint(config.model.vae)
    return found


def refuse_other_inputs(
    old: Mapping[str, str], new: Mapping[str, str], allowed: Collection[str], run: str | Path
) -> None:
    """Raise UserError if a resumed run would read another cache or VAE than before, though perhaps by the same name."""
    for name in sorted(old.keys() & new.keys() - set(allowed)):
        if old[name] != new[name]:
            raise UserError(
                f"{run} cannot resume: what {name} names had fingerprint {old[name][:16]} and has {new[name][:16]}. Put the"
                f" old one back, or add --allow-change {name}"
            )


def open_loader(config: RunConfig, topology: Topology, start_step: int) -> TrainLoader:
    """This rank's training rows from `start_step` on."""
    data = config.data
    return TrainLoader(
        data.path,
        config.features_folder(),
        seed=config.train.seed,
        streams=data.streams,
        rows_per_step=data.rows_per_step,
        micro_batch_rows=micro_batch_size(config, topology.world_size),
        split=data.split,
        rank=topology.rank,
        world_size=topology.world_size,
        start_step=start_step,
        prefetch_steps=data.prefetch_steps,
        workers=data.workers,
        **data.reading(),
    )


def engine_settings(config: RunConfig, topology: Topology) -> EngineSettings:
    """The engine's part of the configuration, "auto" resolved for this device."""
    train, precision, rank_rows = config.train, config.train.precision, config.data.rows_per_step // topology.world_size
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(topology.device) and train.zero_stage > 0 else "fp32"
    return EngineSettings(
        zero_stage=train.zero_stage,
        precision=precision,
        accumulation_steps=rank_rows // micro_batch_size(config, topology.world_size),
        offload_optimizer=train.offload_optimizer,
        offload_parameters=train.offload_parameters,
        offload_folder=train.offload_folder,
        overrides=config.deepspeed,
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is the device's fast precision: GPUs that have it, CPUs with AMX. Others only emulate it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def start_over(run: Path, topology: Topology) -> None:
    """Put an existing run folder aside, as <run>.1, <run>.2 and so on. Collective."""
    if topology.is_main:
        put_aside(run)
    barrier()


def put_aside(run: Path) -> None:
    """What `start_over` does, for one process."""
    if run.exists():
        number = next(n for n in range(1, sys.maxsize) if not Path(f"{run}.{n}").exists())
        shutil.move(run, f"{run}.{number}")
        print(f"--fresh: {run} is now {run}.{number}", flush=True)


def describe(session: Session) -> str:
    """The plan: what runs on what, over how much data, with which memory."""
    config, manifest, topology = session.config, session.manifest, session.topology
    tokens_per_step = config.data.rows_per_step * manifest.row_tokens
    train_tokens = sum(shard.tokens for shard in manifest.splits["train"])
    epochs = config.train.steps * tokens_per_step / max(train_tokens / max(manifest.fill(), 1e-9), 1)
    device = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
    settings, rows = session.engine.settings, micro_batch_size(config, topology.world_size)
    wanted = config.data.micro_batch_rows
    why = f" (data.micro_batch_rows is {wanted}; a rank has {rows * settings.accumulation_steps} rows)" * (
        rows < wanted
    )
    return "\n".join(
        (
            f"stage {config.stage} in {session.run}: {config.about.purpose}",
            f"{topology.world_size} rank(s) on {device}, {settings.accumulation_steps} micro-batch(es) of"
            f" {rows} x {manifest.row_tokens} tokens each a step{why}",
            f"{config.train.steps:,} steps of {tokens_per_step:,} tokens = {config.train.steps * tokens_per_step:,},"
            f" {epochs:.2f} passes over {config.data.path} ({train_tokens:,} tokens, {manifest.fill():.1%} full)",
            session.engine.parameter_table(),
        )
    )
