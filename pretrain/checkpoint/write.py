"""Writing a run's checkpoints while its training goes on.

A save in the order of events: every rank copies what it owns to host memory, which is all that training waits for; a
thread writes `step-N.partial/rank-R.safetensors`, then a report with its hash; rank 0's thread waits for all reports,
writes the manifest, renames `step-N.partial` to `step-N`, replaces `latest`, and deletes what is no longer kept.
So what has that name is complete, and whatever a kill leaves behind has another one. A failed save is named when it
fails; the next one is waited for, and ends the run if it fails too, but for a full disk: that costs the saves for which there is no room,
and only the last one, or the one for a signal, must succeed.
"""

import contextlib
import json
import platform
import secrets
import sys
import threading
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import FULL
from pretrain.checkpoint.find import checkpoint_name, name_latest, saved_steps, unfinished
from pretrain.checkpoint.manifest import BUFFER, Manifest, SavedFile
from pretrain.checkpoint.slices import write_slices
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.engine.engine import Engine
from pretrain.engine.file_memory import empty_in_file
from pretrain.engine.held import Held
from pretrain.engine.partition import Partition
from pretrain.ranks.distributed import Topology, all_reduce_sum, any_rank, barrier

POLL_S = 0.02


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, without stopping the training.

    Args:
        run: the run's folder, on a file system that all ranks share.
        keep_last: number of newest checkpoints kept, at least 1.
        keep_every: also keep those whose step it divides (0: none).
        restored: step of the checkpoint that the run goes on from, which is kept too: it alone is known to be readable.
        timeout_s: how long rank 0 waits for the other ranks' files.

    The constructor is collective and removes what killed saves left behind, so one job at a time may use a run folder.
    """

    def __init__(
        self,
        run: Path,
        topology: Topology,
        keep_last: int = 2,
        keep_every: int = 0,
        timeout_s: float = 1800.0,
        restored: int | None = None,
    ) -> None:
        if keep_last < 1:
            raise UserError(f"train.keep_last is {keep_last}; at least the newest checkpoint must be kept")
        self.run, self.storage, self.topology, self.timeout_s = run, storage_of(run), topology, timeout_s
        self.keep_last, self.keep_every, self.restored = keep_last, keep_every, restored
        if topology.is_main:
            self._delete_unfinished()
        # Reports carry this number, so that one from an earlier life of the job is never taken for a new one.
        self._life = int(all_reduce_sum([float(secrets.randbits(48)) if topology.is_main else 0.0])[0])
        self._saves = 0
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, engine: Engine) -> None:
        """Allocate host memory for a copy of the states now, which takes longer than to copy them."""
        self._host.copy(engine.partition)

    def save(
        self,
        step: int,
        engine: Engine,
        extra: dict[str, Any],
        blocking: bool = False,
    ) -> float:
        """Save the state after `step` updates; every rank calls it.

        Args:
            extra: JSON-able facts to keep (configuration, data fingerprint, counters).
            blocking: return only when the checkpoint is complete.

        Returns: seconds for which the caller was held up.
        Raises: RuntimeError when it is not, or when this save failed after another, not for a full disk alone; UserError for a value
        that JSON cannot hold.
        """
        began = time.perf_counter()
        again = not self.settle()
        if again:
            if self.topology.is_main:
                self._delete_unfinished()  # it may be what fills the disk
            barrier()
        self._error = None
        partition = engine.partition
        slices = self._host.copy(partition)
        if self.topology.is_main:
            slices += [(f"{BUFFER}/{name}", tensor.detach().cpu().clone()) for name, tensor in engine.buffers().items()]
        manifest = self._manifest(step, engine, extra)
        self._saves += 1
        job = f"{self._life}-{self._saves}"
        self._thread = threading.Thread(
            target=self._write, args=(step, slices, manifest, job), name="checkpoint", daemon=True
        )
        self._thread.start()
        if blocking or (
            again and not self.settle() and any_rank(self._error is not None and not _is_full(self._error))
        ):
            self.wait()
        return time.perf_counter() - began

    def settle(self) -> bool:
        """Wait for the save in flight; False if the last one failed, on whatever rank. Collective."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        # Also a barrier: a launcher kills the others when one rank leaves, and rank 0 may still be committing.
        return not any_rank(self._error is not None)

    def wait(self) -> None:
        """Until the save in flight is complete on all ranks. Collective. Raises its error, on every rank."""
        if not self.settle():
            reason = self._error or "see the other ranks' messages"
            raise RuntimeError(f"writing the checkpoint failed: {reason}") from self._error

    def _manifest(self, step: int, engine: Engine, extra: dict[str, Any]) -> Manifest:
        try:
            extra = json.loads(json.dumps(extra, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"what is saved beside the weights must be JSON: {error}") from None
        return Manifest(
            step=step,
            updates=engine.updates,
            world_size=self.topology.world_size,
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            parameters=engine.partition.parameters,
            aliases=engine.aliases(),
            files={},
            extra=extra,
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        )

    def _write(self, step: int, slices: list[tuple[str, Tensor]], manifest: Manifest, job: str) -> None:
        name = checkpoint_name(step)
        partial, reports = Checkpoint(self.storage, f"{name}.partial"), Checkpoint(self.storage, f"{name}.reports")
        try:
            saved = write_slices(partial, _file_of(self.topology.rank), slices)
            self._report(reports, {"job": job} | asdict(saved))
            if self.topology.is_main:
                manifest.files.update(self._await_reports(reports, job))
                manifest.save(partial)
                self.storage.commit(partial.name, name)
                name_latest(self.storage, step)
                self._delete_old(step)
        except BaseException as error:
            self._error = error
            if not self.topology.is_main:  # so that rank 0 need not wait for its timeout
                with contextlib.suppress(OSError):
                    self._report(reports, {"job": job, "error": str(error), "errno": getattr(error, "errno", None)})
            warning = "" if _is_full(error) else ", and the run ends if the next one fails too"
            print(
                f"rank {self.topology.rank}: the checkpoint after step {step} could not be written: {error}; the one before it"
                f" stands{warning}",
                file=sys.stderr,
                flush=True,
            )

    def _report(self, reports: Checkpoint, content: dict[str, Any]) -> None:
        with contextlib.suppress(FileNotFoundError):  # rank 0 has read the last report, and removed them all
            self.storage.put(reports.name, _file_of(self.topology.rank), [json.dumps(content).encode()])

    def _await_reports(self, reports: Checkpoint, job: str) -> dict[str, SavedFile]:
        waiting = {_file_of(rank) for rank in range(self.topology.world_size)}
        found: dict[str, SavedFile] = {}
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            for name in sorted(waiting):
                with contextlib.suppress(FileNotFoundError), reports.read(name) as file:
                    report = json.loads(file.read())
                    if report.pop("job") == job:
                        if "error" in report:
                            raise OSError(report["errno"], f"{name}: {report['error']}")
                        found[name] = SavedFile.of(report)
            waiting -= found.keys()
            if waiting:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{', '.join(sorted(waiting))} not written within {self.timeout_s:.0f} s")
                time.sleep(POLL_S)
        self.storage.remove(reports.name)
        return found

    def _delete_unfinished(self) -> None:
        for name in unfinished(self.storage):
            self.storage.remove(name)

    def _delete_old(self, written: int) -> None:
        earlier = [step for step in saved_steps(self.run) if step <= written]  # later ones are not this job's
        for step in earlier[self.keep_last :]:
            if step != self.restored and (not self.keep_every or step % self.keep_every):
                self.storage.remove(checkpoint_name(step))


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in FULL


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


class HostCopy:
    """Host memory for a snapshot of this rank's slices, reused from save to save; pinned if the states are on a GPU, in
    files if they are."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, partition: Partition) -> list[tuple[str, Tensor]]:
        """Copy every owned range of every state; returns (name in the file, host tensor)."""
        on_gpu = any(flat.is_cuda for flat in partition.flats)
        runs = _runs(partition.owned)
        slices, filled = [], dict.fromkeys(self._memory, 0)
        for state, total in _totals(partition, runs).items():
            if state not in self._memory:
                self._memory[state] = (
                    torch.empty(total, pin_memory=on_gpu)
                    if partition.files is None
                    else empty_in_file(total, torch.float32, partition.files)
                )
            filled[state] = 0
        for flat, offset, numel, members in runs:
            for state in partition.states(flat):
                target = self._memory[state].narrow(0, filled[state], numel)
                target.copy_(partition.flat(state, flat)[offset : offset + numel], non_blocking=on_gpu)
                for held in members:
                    begin = held.offset - offset
                    slices.append((f"{state}/{held.name}@{held.start}", target[begin : begin + held.numel]))
                filled[state] += numel
        if on_gpu:
            torch.cuda.synchronize()
        return slices


def _totals(partition: Partition, runs: list[tuple[int, int, int, list[Held]]]) -> dict[str, int]:
    """Number of elements that this rank owns, by state."""
    totals: dict[str, int] = {}
    for flat, _, numel, _ in runs:
        for state in partition.states(flat):
            totals[state] = totals.get(state, 0) + numel
    return totals


def _runs(owned: list[Held]) -> list[tuple[int, int, int, list[Held]]]:
    """Join ranges that are neighbours in the same flat tensor, so that few large copies are made: (flat, offset, numel, ranges)."""
    runs: list[tuple[int, int, int, list[Held]]] = []
    for held in sorted(owned, key=lambda held: (held.flat, held.offset)):
        if runs:
            flat, offset, numel, members = runs[-1]
            if flat == held.flat and offset + numel == held.offset:
                runs[-1] = (flat, offset, numel + held.numel, [*members, held])
                continue
        runs.append((held.flat, held.offset, held.numel, [held]))
    return runs
