"""Train a stage: `deepspeed --hostfile hosts pretrain/train.py --config dit_xl`; or under torchrun, srun, plain python.

A run is a function of (configuration, data, step): the same command again resumes the newest complete checkpoint.
"""

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script has its own folder, not the repository, on the path. And while the imports take their time, there is
    # nothing to save.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from data_pipeline.core.home import settle_home
    from data_pipeline.core.imports import begin_imports, end_imports
    from pretrain.faults.exit_codes import EXIT_REQUEUE
    from pretrain.ranks.launcher import first_launchers, stop_signals

    # A launcher ends the other ranks as soon as one has found a mistake: they find it too, and end with its code, not as preempted ones.
    asked_to_end: list[int] = []
    for number in stop_signals():
        signal.signal(number, lambda number, _: asked_to_end.append(number))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    begin_imports()
    settle_home()  # libraries ask for it while they are imported
    first_launchers()
    from pretrain.config.command_line import check

    check()  # a mistake is said before torch is imported, which takes seconds
    if asked_to_end:
        os._exit(EXIT_REQUEUE)
    for number in stop_signals():
        signal.signal(number, lambda *_: os._exit(EXIT_REQUEUE))

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.reading.batch import Batch
from pretrain.checkpoint.find import checkpoint_name
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.config.command_line import own_rank, read
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.faults.exit_codes import EXIT_INTERRUPTED, EXIT_OK, EXIT_REQUEUE
from pretrain.faults.exits import exit_code_of, leave
from pretrain.faults.output import lasting_output
from pretrain.faults.signals import INTERRUPT, ends_at_once
from pretrain.faults.spikes import TooManySkips
from pretrain.faults.spikes import record_skip as write_skip
from pretrain.ranks.distributed import Topology, all_reduce_sum, barrier, init_distributed, shutdown
from pretrain.session import Session, open_session
from pretrain.stages.base import Stage
from pretrain.stages.rows import heldout_rows
from pretrain.telemetry.metrics import MetricSums, reduce_metrics


def train(session: Session, profiler: Any = None, until: int | None = None) -> int:
    """The loop, up to `until` steps instead of all. Returns the process's exit code. Raises: TooManySkips."""
    config, engine, telemetry, beat = session.config.train, session.engine, session.telemetry, session.watchdog.beat
    session.signals.at_work = True
    while session.step < (until or config.steps):
        step = session.step
        beat(step, "data")
        telemetry.begin_step()
        batches = session.loader.next_step()

        beat(step, "count")
        counts, code = agree(session.stage, batches, session.signals.received)
        if code:
            return stop(session, code)

        beat(step, "compute")
        session.stage.step = step
        for i, batch in enumerate(batches):
            on_device = batch.to(session.topology.device, non_blocking=True)
            metrics = engine.forward_backward(on_device, counts, last=i == len(batches) - 1)
            telemetry.add(metrics, session.stage.flops(batch))

        beat(step, "measure")
        measured = engine.measure()
        skip = session.guard.verdict(step, measured.loss, measured.grad_norm)

        beat(step, "update")
        lr = session.lr(step)
        engine.step(step, lr, skip=skip is not None)
        session.step += 1

        beat(step, "log")
        telemetry.end_step(step, measured.loss, measured.grad_norm, lr, session.loader.wait_seconds, skip)
        if skip is not None:
            record_skip(session, step, skip, measured, batches)
        if profiler is not None:
            profiler.step()
        if is_due(session.step, config.checkpoint_every, config.steps):
            beat(step, "checkpoint")
            session.save(blocking=session.step == config.steps)
        if is_due(session.step, config.eval_every, config.steps):
            beat(step, "evaluate")
            evaluate(session)
    return EXIT_OK


def agree(stage: Stage, batches: Sequence[Batch], asked_by: str | None) -> tuple[dict[str, int], int]:
    """The step's token counts over all ranks, and the exit code to stop with if any of them is asked to, else 0: one all-reduce."""
    own: dict[str, int] = {}
    for batch in batches:
        for name, count in stage.token_counts(batch).items():
            own[name] = own.get(name, 0) + count
    names = sorted(own)
    asked = [float(asked_by not in (None, INTERRUPT)), float(asked_by == INTERRUPT)]
    *counts, signals, interrupts = all_reduce_sum([*(own[name] for name in names), *asked])
    code = EXIT_REQUEUE if signals else EXIT_INTERRUPTED if interrupts else 0
    return {name: int(count) for name, count in zip(names, counts)}, code


def evaluate(session: Session) -> dict[str, float]:
    """The stage's metrics on held-out rows with the EMA weights, and what it writes, logged. Collective."""
    config, topology, started = session.config, session.topology, time.perf_counter()
    rows = heldout_rows(config, config.train.eval_rows, rank=topology.rank, world_size=topology.world_size)
    sums = MetricSums()
    with session.engine.ema_weights():
        for batch in rows:
            session.watchdog.beat(session.step, "evaluate")
            # A sum and a weight per metric: how the loss is normalised does not enter, and a batch may be all filler.
            counts = {name: max(count, 1) for name, count in session.stage.token_counts(batch).items()}
            sums.add(session.engine.evaluate(batch.to(topology.device), counts).metrics)
        samples = session.samples()
    metrics = session.stage.summarised(reduce_metrics(sums.totals()))
    session.telemetry.evaluation(session.step, metrics, time.perf_counter() - started, samples)
    return metrics


def record_skip(session: Session, step: int, reason: str, measured: Any, batches: Sequence[Batch]) -> None:
    """Write down the rows of a skipped step. Collective. Raises: TooManySkips."""
    entry = {"step": step, "reason": reason, "loss": str(measured.loss), "grad_norm": str(measured.grad_norm)}
    write_skip(session.run, session.topology.rank, session.topology.world_size, entry, batches)
    session.guard.enforce(step)


def stop(session: Session, code: int) -> int:
    """Save, because the scheduler is about to take the machine, or someone pressed Ctrl-C; returns `code`."""
    session.watchdog.end_within(session.config.train.grace_s)
    session.watchdog.beat(session.step, "checkpoint")
    name = session.signals.received or "a signal on another rank"
    session.telemetry.say(f"{name}: writing a checkpoint after step {session.step}, then exit code {code}")
    session.save(blocking=True)
    session.telemetry.say(f"checkpoint of step {session.step} is in {session.run}; the same command goes on from there")
    session.telemetry.event("requeue", step=session.step, signal=name)
    return code


def is_due(step: int, every: int, last: int) -> bool:
    """Whether what happens every `every` steps (0: never) and after the last one is due after `step` finished steps."""
    return every > 0 and (step % every == 0 or step == last)


def train_with_rewinds(session: Session, profiler: Any = None) -> int:
    """`train`, and once, if train.rewind is set, again from the checkpoint before the bad steps."""
    try:
        return train(session, profiler)
    except TooManySkips:
        if not session.config.train.rewind or session.rewinds or not session.rewind():
            raise
        return train(session, profiler)


def run(config: RunConfig, topology: Topology, arguments: argparse.Namespace) -> int:
    """Open a session, train, close it; the exit code."""
    with ExitStack() as stack:
        session = open_session(config, topology, stack, arguments.allow_change, arguments.fresh)
        if session.step >= config.train.steps:
            session.telemetry.say(f"{session.run} is finished: {session.step} of {config.train.steps} steps")
        with profiled(session, arguments.profile) as profiler:
            code = train_with_rewinds(session, profiler)
        session.watchdog.beat(session.step, "end")
        session.writer.wait()
        if code == EXIT_OK:
            session.telemetry.say(ending(session))
        session.close()
    return code


def ending(session: Session) -> str:
    """What is there now, and what comes next."""
    run, kind = session.run, stage_kind(session.config.stage)
    following = [f"textldm diagnose --run {run}"] if kind.diagnosis else []
    following += [f"textldm convert --run {run} --output export/{run.name}"] if kind.export else []
    then = f"; next: {', then '.join(following)}" if following else ""
    return f"finished; checkpoint {Checkpoint(storage_of(run), checkpoint_name(session.step))}{then}"


def dry_run(config: RunConfig, topology: Topology) -> int:
    """Build everything, take one step in a folder beside the run's, say what it took, leave nothing."""
    folder = Path(f"{config.run_folder}.dry-run")
    if folder.exists():
        raise UserError(f"{folder} exists, where the dry run would work and then clean up: remove it or rename it")
    # A start would look for checkpoints there; what is written here goes to the folder.
    storage_of(config.run_folder).list()
    config.train.run = str(folder)
    config.telemetry.wandb = config.telemetry.tensorboard = False
    made = next((parent for parent in reversed(folder.parents) if not parent.exists()), folder)
    barrier()  # every rank has looked before one of them makes folders
    try:
        with ExitStack() as stack:
            session = open_session(config, topology, stack)
            started = time.perf_counter()
            train(session, until=1)
            seconds = time.perf_counter() - started
            session.telemetry.say(f"dry run: everything works, one step took {seconds:.2f} s; nothing is left of it")
            session.close()
    finally:
        if topology.is_main:
            shutil.rmtree(made, ignore_errors=True)
    return EXIT_OK


def dry_run_as(config: RunConfig, rank: int, ranks: int) -> int:
    """Say what one rank of so many would hold, compute and send; nothing is built but shapes."""
    from pretrain.plan.estimate import text_of
    from pretrain.plan.rank import plan_rank, report

    print(report(plan_rank(config, rank, ranks, *text_of(config))))
    return EXIT_OK


@contextmanager
def profiled(session: Session, steps: int) -> Iterator[Any]:
    """torch's profiler over `steps` steps after two others; rank 0 leaves a trace and a table in <run>/profile."""
    if not steps or not session.topology.is_main:
        yield None
        return
    folder = session.run / "profile"
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(folder / f"trace-step-{session.step}.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
        (folder / f"table-step-{session.step}.txt").write_text(table, encoding="utf-8")
        session.telemetry.say(f"profile of {steps} steps in {folder}")

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler


@lasting_output()
def main(argv: list[str] | None = None) -> int:
    """Run the command line; a rank that fails beside others ends at once, so that the launcher ends them too."""
    with ends_at_once():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    rank, world_size = own_rank(os.environ), int(os.environ.get("WORLD_SIZE", 1))
    try:
        arguments, config = read(argv)
        if arguments.as_rank:
            return dry_run_as(config, *arguments.as_rank)
        topology = init_distributed(config.train.timeout_s)
        rank, world_size = topology.rank, topology.world_size
        code = dry_run(config, topology) if arguments.dry_run else run(config, topology, arguments)
    except BaseException as error:
        code = exit_code_of(error, rank)
        if world_size > 1:
            leave(code)
    return code


if __name__ == "__main__":
    end_imports()
    exit_code = main()
    shutdown()  # not in main(), which another program may call again: DeepSpeed keeps hold of the first process group
    # Past the interpreter's own end: a communication thread that is alive there takes the process down with "terminate called".
    leave(exit_code)
