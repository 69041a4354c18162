"""Writing a run's checkpoints while its training goes on.

A save in the order of events: every rank copies what it owns to host memory, which is all that training waits for; a
thread writes `checkpoints/step-N.partial/rank-R.safetensors`, then a report with its hash; rank 0's thread waits for
all reports, writes the manifest, renames the folder to `step-N`, replaces `latest`, and deletes what is no longer kept.
So a folder with that name is complete, and whatever a kill leaves behind has another name. A failed save is named when it
fails; the next one is waited for, and ends the run if it fails too.
"""

import contextlib
import json
import platform
import secrets
import shutil
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.slices import (
    BUFFER,
    FOLDER,
    Manifest,
    folder_name,
    remove_checkpoint,
    saved_steps,
    sync_folder,
    write_atomically,
    write_slices,
)
from pretrain.engine.file_memory import empty_in_file
from pretrain.engine.optim import STATES
from pretrain.ranks.distributed import Topology, all_reduce_sum, any_rank, barrier

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine
    from pretrain.engine.partition import Held, Partition

POLL_S = 0.02


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, without stopping the training.

    Args:
        run: the run's folder, on a file system that all ranks share.
        keep_last: number of newest checkpoints kept, at least 1.
        keep_every: also keep those whose step it divides (0: none).
        timeout_s: how long rank 0 waits for the other ranks' files.

    The constructor is collective and removes what killed saves left behind, so one job at a time may use a run folder.
    """

    def __init__(
        self, run: Path, topology: Topology, keep_last: int = 2, keep_every: int = 0, timeout_s: float = 1800.0
    ) -> None:
        if keep_last < 1:
            raise UserError(f"train.keep_last is {keep_last}; at least the newest checkpoint must be kept")
        self.folder, self.topology, self.timeout_s = Path(run) / FOLDER, topology, timeout_s
        self.keep_last, self.keep_every = keep_last, keep_every
        if topology.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._delete_unfinished()
        # Reports carry this number, so that one from an earlier life of the job is never taken for a new one.
        self._life = int(all_reduce_sum([float(secrets.randbits(48)) if topology.is_main else 0.0])[0])
        self._saves = 0
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def prepare(self, engine: "Engine") -> None:
        """Allocate host memory for a copy of the states now, which takes longer than to copy them."""
        self._host.copy(engine.partition)

    def save(
        self,
        step: int,
        engine: "Engine",
        extra: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
        blocking: bool = False,
    ) -> float:
        """Save the state after `step` updates; every rank calls it.

        Args:
            extra: JSON-able facts to keep (configuration, data fingerprint, counters).
            tensors: further tensors to keep beside the stage's buffers (rank 0's are written).
            blocking: return only when the checkpoint is complete, as is done after a save that failed.

        Returns: seconds for which the caller was held up.
        Raises: the error of the write if that was waited for; UserError for a value that JSON cannot hold.
        """
        began = time.perf_counter()
        if not self.settle():
            blocking = True
            if self.topology.is_main:
                self._delete_unfinished()  # it may be what fills the disk
            barrier()
        self._error = None
        partition = engine.partition
        slices = self._host.copy(partition)
        if self.topology.is_main:
            kept = engine.buffers() | (tensors or {})
            slices += [(f"{BUFFER}/{name}", tensor.detach().cpu().clone()) for name, tensor in kept.items()]
        manifest = self._manifest(step, engine, extra)
        self._saves += 1
        job = f"{self._life}-{self._saves}"
        self._thread = threading.Thread(
            target=self._write, args=(step, slices, manifest, job), name="checkpoint", daemon=True
        )
        self._thread.start()
        if blocking:
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

    def close(self) -> None:
        """Wait for the save in flight (collective)."""
        self.wait()

    def _manifest(self, step: int, engine: "Engine", extra: dict[str, Any]) -> Manifest:
        try:
            extra = json.loads(json.dumps(extra, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(f"what is saved beside the weights must be JSON: {error}") from None
        parameters = {n: {"shape": list(p.shape), "decays": p.decays} for n, p in engine.partition.parameters.items()}
        return Manifest(
            step=step,
            adam_step=engine.partition.adam_step,
            world_size=self.topology.world_size,
            zero_stage=engine.settings.zero_stage,
            precision=engine.settings.precision,
            states=list(STATES),
            parameters=parameters,
            aliases=engine.aliases(),
            files={},
            extra=extra,
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
        )

    def _write(self, step: int, slices: list[tuple[str, Tensor]], manifest: Manifest, job: str) -> None:
        partial = self.folder / f"{folder_name(step)}.partial"
        name = f"rank-{self.topology.rank:05d}.safetensors"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            report = write_slices(partial / name, slices)
            # Not durable: it speaks to rank 0 of this job alone, whose manifest then syncs the folder with all its names.
            write_atomically(partial / f"{name}.json", json.dumps(report | {"job": job}), durable=False)
            if self.topology.is_main:
                manifest.files.update(self._await_reports(partial, job))
                manifest.save(partial)
                self._commit(partial, self.folder / folder_name(step))
                self._delete_old()
        except BaseException as error:
            self._error = error
            if not self.topology.is_main:  # so that rank 0 need not wait for its timeout
                with contextlib.suppress(OSError):
                    write_atomically(
                        partial / f"{name}.json", json.dumps({"job": job, "error": str(error)}), durable=False
                    )
            print(
                f"rank {self.topology.rank}: the checkpoint after step {step} could not be written: {error}; the one before it"
                " stands, and the run ends if the next one fails too",
                file=sys.stderr,
                flush=True,
            )

    def _await_reports(self, partial: Path, job: str) -> dict[str, dict[str, Any]]:
        waiting = {f"rank-{rank:05d}.safetensors" for rank in range(self.topology.world_size)}
        found: dict[str, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            for name in sorted(waiting):
                path = partial / f"{name}.json"
                report = json.loads(path.read_text()) if path.exists() else {}
                if report.pop("job", None) == job:
                    if "error" in report:
                        raise OSError(f"{name}: {report['error']}")
                    found[name] = report
                    path.unlink()
            waiting -= found.keys()
            if waiting:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{', '.join(sorted(waiting))} not written within {self.timeout_s:.0f} s")
                time.sleep(POLL_S)
        return found

    def _commit(self, partial: Path, final: Path) -> None:
        if final.exists():  # the same step again, after a rewind
            final.rename(final.with_name(f"{final.name}.replaced"))
        partial.rename(final)
        sync_folder(self.folder)
        write_atomically(self.folder / "latest", f"{final.name}\n")
        shutil.rmtree(final.with_name(f"{final.name}.replaced"), ignore_errors=True)

    def _delete_unfinished(self) -> None:
        for leftover in self.folder.glob("step-*.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _delete_old(self) -> None:
        for step, path in saved_steps(self.folder)[self.keep_last :]:
            if not self.keep_every or step % self.keep_every:
                remove_checkpoint(path)


class HostCopy:
    """Host memory for a snapshot of this rank's slices, reused from save to save; pinned if the states are on a GPU, in
    files if they are."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def copy(self, partition: "Partition") -> list[tuple[str, Tensor]]:
        """Copy every owned range of every state; returns (name in the file, host tensor)."""
        total = sum(held.numel for held in partition.owned)
        on_gpu = any(flat.is_cuda for flat in partition.flats)
        slices = []
        for state in STATES:
            memory = self._memory.get(state)
            if memory is None or memory.numel() != total:
                memory = self._memory[state] = (
                    torch.empty(total, pin_memory=on_gpu)
                    if partition.files is None
                    else empty_in_file(total, torch.float32, partition.files)
                )
            position = 0
            for flat, offset, numel, members in _runs(partition.owned):
                target = memory[position : position + numel]
                target.copy_(partition.flat(state, flat)[offset : offset + numel], non_blocking=on_gpu)
                for held in members:
                    begin = held.offset - offset
                    slices.append((f"{state}/{held.name}@{held.start}", target[begin : begin + held.numel]))
                position += numel
        if on_gpu:
            torch.cuda.synchronize()
        return slices


def _runs(owned: list["Held"]) -> list[tuple[int, int, int, list["Held"]]]:
    """Neighbouring ranges of a flat joined, as (flat, offset, numel, ranges): few large copies, not many small ones."""
    runs: list[tuple[int, int, int, list[Held]]] = []
    for held in sorted(owned, key=lambda held: (held.flat, held.offset)):
        if runs:
            flat, offset, numel, members = runs[-1]
            if flat == held.flat and offset + numel == held.offset:
                runs[-1] = (flat, offset, numel + held.numel, [*members, held])
                continue
        runs.append((held.flat, held.offset, held.numel, [held]))
    return runs
