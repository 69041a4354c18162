"""A training session: all that the loop of pretrain/train.py works with, opened step by step in this order:

    check          the data, its held-out split and the frozen inputs are there
    compare_ranks  all ranks read the same and have the same versions
    own            an earlier run in the same folder is put aside, if --fresh says so; the folder is this job's alone from here on
    watch          signals and hangs are noticed from here on
    find           the newest complete checkpoint; what differs from its run is allowed
    measure_once   what the stage must know before it is built goes into the run folder: by all ranks together
    build          the stage, with the same first weights on every rank, at ZeRO 3 in pieces from the first, and its engine
    restore        weights, moments, EMA and buffers of the checkpoint
    open_records   telemetry, the guard against bad steps, the writer of checkpoints
    open_loader    this rank's rows from the next step on
    tell           the plan, and what changed since the checkpoint

Constructors build; what measures, writes or waits for other ranks is one of these steps.
"""

import json
import os
import platform
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from data_pipeline.core.errors import EXIT_USER, UserError
from data_pipeline.core.keys import key
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.streams import idle_share
from pretrain.checkpoint.find import discard_after, newest_complete, put_aside_after, saved_steps
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import restore
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.config.registry import stage_kind
from pretrain.config.resume import Difference
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import Engine, EngineSettings, in_pieces
from pretrain.engine.schedule import learning_rate
from pretrain.faults.exit_codes import EXIT_INTERRUPTED
from pretrain.faults.exits import leave
from pretrain.faults.signals import INTERRUPT, Signals
from pretrain.faults.spikes import SpikeGuard
from pretrain.faults.watchdog import Watchdog
from pretrain.ranks.agreement import refuse_differences, versions
from pretrain.ranks.distributed import Together, Topology, all_reduce_sum, any_rank, barrier, bytes_of_rank_0
from pretrain.runs.folder import begun_anew, put_aside, remove_unstarted, write_config
from pretrain.runs.inputs import Inputs, find_inputs, read_once_a_host
from pretrain.runs.owner import Ownership
from pretrain.runs.record import RunRecord
from pretrain.runs.resume import allowed_differences, refuse_lost_checkpoints
from pretrain.stages.base import Occasion, Stage
from pretrain.stages.build import build_stage, measure, take_first_weights
from pretrain.telemetry.record import Telemetry


@dataclass
class Session:
    """The parts of a run in progress; `step` counts finished steps, so the next one has this number."""

    config: RunConfig
    topology: Topology
    inputs: Inputs
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

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.config.run_folder

    @property
    def manifest(self) -> Manifest:
        """Of the prepared data."""
        return self.inputs.manifest

    def lr(self, step: int) -> float:
        """Learning rate of update number `step`."""
        schedule = self.config.schedule
        return learning_rate(step, self.config.optimizer.lr, schedule, self.config.train.steps)

    def save(self, blocking: bool = False) -> None:
        """Write a checkpoint of the state after `step` steps, unless there is one. Collective."""
        if self.step == self.saved_step and self.writer.settle():
            return
        stalled_s = self.writer.save(self.step, self.engine, extra=self.record().extra(), blocking=blocking)
        self.saved_step = self.step
        self.telemetry.event("checkpoint", step=self.step, stalled_s=stalled_s, blocking=blocking)

    def rewind(self) -> bool:
        """Go on behind the bad steps with the newest checkpoint before them; False if there is none. Collective.

        The same rows would end the same way, so all rows between that checkpoint and here are left out.
        """
        self.writer.settle()  # whether or not it failed: what is complete counts
        bad_from = self.guard.state().skipped_steps[0]
        earlier = [step for step in saved_steps(self.run) if step <= bad_from]
        barrier()  # every rank has looked before rank 0 deletes
        if not earlier:
            return False
        discard_after(self.run, max(earlier), self.topology)
        path = newest_complete(self.run, self.topology)
        if path is None:
            return False
        restored = restore(path, self.engine)
        put_aside_after(self.run, restored.step, self.topology)
        self.writer.restored = restored.step
        record = RunRecord.of_checkpoint(restored)
        self.guard.load(record.guard)
        self.telemetry.load(record.telemetry)
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

    def samples(self) -> list[dict[str, str]]:
        """What the stage writes at a held-out evaluation, for the log. Collective."""
        write = stage_kind(self.config.stage).load("samples")
        if write is None:
            return []
        self.watchdog.beat(self.step, "evaluate")
        return write(Occasion(self.stage, self.config, self.manifest, self.engine.call, self.topology.is_main))

    def record(self) -> RunRecord:
        """What a checkpoint says of this run."""
        return RunRecord.of_run(
            self.config,
            self.manifest,
            inputs=self.inputs.fingerprints,
            guard=self.guard.state(),
            telemetry=self.telemetry.state(),
            rewinds=self.rewinds,
        )


def open_session(
    config: RunConfig, topology: Topology, stack: ExitStack, allow_change: Collection[str] = (), fresh: bool = False
) -> Session:
    """Build everything and resume the newest complete checkpoint of the run folder, if there is one. Collective.

    With `fresh`, an existing run folder is put aside, once the inputs are known to be there.
    What must not survive an error (signal handlers, threads) is registered with `stack`. Raises: UserError.
    """
    inputs = check(config, topology)
    compare_ranks(topology, inputs)
    own(config, topology, stack, fresh)
    signals, watchdog = watch(config, topology, stack)
    earlier = find(config, topology, inputs, allow_change)
    measure_once(config, topology, inputs)
    stage, engine = build(config, topology, inputs, new=earlier.checkpoint is None)
    step = restore(earlier.checkpoint, engine).step if earlier.checkpoint else 0
    guard, telemetry, writer = open_records(config, topology, inputs, engine, stage, earlier, step)
    loader = open_loader(config, topology, step)
    session = Session(
        config, topology, inputs, stage, engine, loader, writer, guard, telemetry, signals, watchdog, step=step,
        saved_step=step if earlier.checkpoint else -1, rewinds=earlier.record.rewinds if earlier.record else 0,
    )  # fmt: skip
    stack.callback(lambda: session.loader.close())
    tell(session, earlier)
    return session


@dataclass(frozen=True)
class Earlier:
    """The checkpoint that a run goes on from, what it says of its run, and the allowed differences; all empty for a new run."""

    checkpoint: Checkpoint | None = None
    record: RunRecord | None = None
    differences: list[Difference] = field(default_factory=list)


def check(config: RunConfig, topology: Topology) -> Inputs:
    """What is wrong with the input is found before anything is built. Collective. Raises: UserError."""
    if topology.world_size > 1:
        read_once_a_host(config, topology.rank, topology.local_rank, bytes_of_rank_0)
    inputs = find_inputs(config)
    if config.train.eval_every and not inputs.manifest.splits["heldout"]:
        raise UserError(
            f"{config.data.path} has no held-out split, which train.eval_every={config.train.eval_every} evaluates: set"
            " train.eval_every=0, or prepare the data again with --heldout-fraction 0.005"
        )
    return inputs


def compare_ranks(topology: Topology, inputs: Inputs) -> None:
    """Refuse ranks that read other data or compute with other versions than rank 0. Collective. Raises: UserError on all ranks."""
    facts = versions() | {"data.path": inputs.manifest.fingerprint} | inputs.fingerprints
    refuse_differences(facts, topology.hostname, topology.rank, topology.world_size, all_reduce_sum)


def own(config: RunConfig, topology: Topology, stack: ExitStack, fresh: bool) -> None:
    """Put an existing run folder aside, if `fresh`; hold the folder until `stack` is left. Collective. Raises: UserError on rank 0."""
    refusal = None
    if topology.is_main:
        try:
            if fresh:
                put_aside(config.run_folder)
            remove = remove_unstarted(config.run_folder)
            stack.callback(Ownership(config.run_folder).release)
            stack.callback(remove)
            if fresh:
                begun_anew(config.run_folder)
        except UserError as error:
            refusal = error
    if any_rank(refusal is not None):
        raise refusal or SystemExit(EXIT_USER)


def watch(config: RunConfig, topology: Topology, stack: ExitStack) -> tuple[Signals, Watchdog]:
    """Until `stack` is left."""
    train = config.train
    signals = stack.enter_context(Signals())
    watchdog = stack.enter_context(
        Watchdog(train.watchdog_s, config.run_folder, topology.rank, topology.hostname, world_size=topology.world_size)
    )

    def first() -> None:
        watchdog.end_within(train.grace_s)
        if topology.is_main and signals.received == INTERRUPT:
            tell_now("Ctrl-C: a checkpoint after this step, then the end; once more ends at once")

    def second() -> None:
        steps = saved_steps(config.run_folder)
        if topology.is_main:
            saved = f"the newest checkpoint is that of step {steps[0]}" if steps else "there is no checkpoint yet"
            tell_now(f"Ctrl-C, twice: ended at once; {saved}")
        leave(EXIT_INTERRUPTED)

    signals.on_first, signals.on_second = first, second
    return signals, watchdog


def tell_now(text: str) -> None:
    """A line on stderr from a signal handler, which may have interrupted a print."""
    os.write(2, f"\n{text}\n".encode())


def find(config: RunConfig, topology: Topology, inputs: Inputs, allow_change: Collection[str]) -> Earlier:
    """The checkpoint to go on from. Collective. Raises: UserError when the run cannot go on from what is there."""
    checkpoint = newest_complete(config.run_folder, topology)
    if checkpoint is None:
        refuse_lost_checkpoints(config.run_folder)
        return Earlier()
    saved = read_manifest(checkpoint)
    earlier = RunRecord.of_checkpoint(saved)
    differences = allowed_differences(earlier, config, inputs.manifest, inputs.fingerprints, allow_change)
    put_aside_after(config.run_folder, saved.step, topology)
    return Earlier(checkpoint, earlier, differences)


def measure_once(config: RunConfig, topology: Topology, inputs: Inputs) -> None:
    """What the stage needs in the run folder. Collective."""
    measure(config, inputs.manifest, topology.device, Together.of(topology))
    barrier()


def build(config: RunConfig, topology: Topology, inputs: Inputs, new: bool) -> tuple[Stage, Engine]:
    """Stage and engine; a new run's weights are those of `train.init_from`, if there is one. Collective, because DeepSpeed's part is."""
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.manual_seed(key(config.train.seed, "initial weights") % 2**63)  # every rank builds the same weights
    settings = engine_settings(config, topology)
    with in_pieces(settings):
        stage = build_stage(config, inputs.manifest, topology.device)
    if new:
        take_first_weights(stage, config, inputs.manifest)
    return stage, Engine(stage, settings, config.optimizer, topology)


def open_records(
    config: RunConfig, topology: Topology, inputs: Inputs, engine: Engine, stage: Stage, earlier: Earlier, step: int
) -> tuple[SpikeGuard, Telemetry, CheckpointWriter]:
    """What goes on from the checkpoint beside the weights."""
    train = config.train
    guard = SpikeGuard(train.spike_sigmas, train.max_skips, train.skip_window)
    if earlier.record:
        guard.load(earlier.record.guard)
    telemetry = Telemetry(
        config.run_folder,
        config,
        topology,
        row_tokens=inputs.manifest.row_tokens,
        stage=stage,
        precision=engine.settings.precision,
        start_step=step,
        state=earlier.record.telemetry if earlier.record else None,
    )
    restored = step if earlier.checkpoint else None
    writer = CheckpointWriter(config.run_folder, topology, train.keep_last, train.keep_every, train.timeout_s, restored)
    writer.prepare(engine)  # host buffers before the first save, which would otherwise stall for them
    return guard, telemetry, writer


def open_loader(config: RunConfig, topology: Topology, start_step: int) -> TrainLoader:
    """This rank's training rows from `start_step` on."""
    data = config.data
    return TrainLoader(
        data.path,
        config.features_folder(),
        seed=config.train.seed,
        streams=data.streams,
        rows_per_step=data.rows_per_step,
        micro_batch_rows=data.micro_batch(topology.world_size),
        split=data.split.in_training,
        rank=topology.rank,
        world_size=topology.world_size,
        start_step=start_step,
        workers=data.workers,
        pin_memory=topology.device.type == "cuda",
        **data.reading(),
    )


def engine_settings(config: RunConfig, topology: Topology) -> EngineSettings:
    """The engine's part of the configuration, "auto" resolved for this device."""
    train, precision = config.train, config.train.computes_in(topology.device)
    rows, micro_batch = config.data.rank_rows(topology.world_size), config.data.micro_batch(topology.world_size)
    return EngineSettings.of(
        train, precision=precision, accumulation_steps=rows // micro_batch, overrides=config.deepspeed
    )


def tell(session: Session, earlier: Earlier) -> None:
    """The configuration in the run folder, the plan in the log."""
    if session.topology.is_main:
        write_config(session.config)
    session.telemetry.event(
        "start",
        step=session.step,
        ranks=session.topology.world_size,
        python=platform.python_version(),
        torch=torch.__version__,
    )
    session.telemetry.say(describe(session))
    if earlier.checkpoint:
        session.telemetry.say(f"resuming {earlier.checkpoint} at step {session.step}")
    for change in earlier.differences:
        session.telemetry.say(
            f"changed since then: {change.key} was {json.dumps(change.old)}, is {json.dumps(change.new)}"
        )


def describe(session: Session) -> str:
    """The plan: what runs on what, over how much data, with which memory."""
    config, manifest, topology = session.config, session.manifest, session.topology
    tokens_per_step = config.data.rows_per_step * manifest.row_tokens
    train_tokens = sum(shard.tokens for shard in manifest.splits["train"])
    epochs = config.train.steps * tokens_per_step / max(train_tokens / max(manifest.fill(), 1e-9), 1)
    device = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
    settings, rows = session.engine.settings, config.data.micro_batch(topology.world_size)
    wanted = config.data.micro_batch_rows
    why = f" (data.micro_batch_rows is {wanted}; a rank has {rows * settings.accumulation_steps} rows)" * (
        rows < wanted
    )
    if idle := idle_share(config.data.rows_per_step, topology.world_size):
        why += f"; {idle:.0%} of all ranks' rows are filler: {topology.world_size} ranks do not divide {config.data.rows_per_step} rows"
    return "\n".join(
        (
            f"stage {config.stage} in {session.run}" + (f": {config.about.purpose}" if config.about.purpose else ""),
            f"{topology.world_size} rank(s) on {device}, {settings.accumulation_steps} micro-batch(es) of"
            f" {rows} x {manifest.row_tokens} tokens each a step{why}",
            f"{config.train.steps:,} steps of {tokens_per_step:,} tokens = {config.train.steps * tokens_per_step:,},"
            f" {epochs:.2f} passes over {config.data.path} ({train_tokens:,} tokens, {manifest.fill():.1%} full)",
            session.engine.parameter_table(),
        )
    )
