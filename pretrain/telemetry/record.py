"""The run's record: what is measured between two logged steps, reduced over the ranks and handed to the sinks.

Between logging steps nothing is reduced, written or waited for: metrics are summed on the device, as (sum, weight).
A logging step costs one small all-reduce, in which every rank also gets what the others measured.

Goodput = wall time of the steps that made the present weights, skipped ones left out, over all wall time since the
run's first start: start-up, evaluation, checkpoints, lost steps and the time between restarts count against it.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from pretrain.config.schema import RunConfig
from pretrain.ranks.distributed import Topology, all_reduce_sum
from pretrain.telemetry.flops import peak_flops
from pretrain.telemetry.metrics import MetricSums
from pretrain.telemetry.sinks import Sinks

GIB = 2**30
STRAGGLER = 1.5
"""A rank whose forward passes take this many times the median is named (of an even number, the lower median: of two ranks,
the faster one's)."""


class TelemetryState(BaseModel):
    """What a checkpoint must carry of a run's `Telemetry`."""

    productive_s: float = 0.0
    """Wall time of the steps that made the weights."""


class ForwardTimer:
    """Seconds that a module's forward passes take on this rank: what tells a slow rank from those that wait for it.

    Whole steps take equally long on all ranks, because collectives in the backward pass make them wait; forward passes
    have none (but under ZeRO 3, whose gathers hide stragglers from this). On a GPU, events are recorded, and read at
    logging steps only.
    """

    def __init__(self, module: nn.Module, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[Any, Any]] = []
        self._handles = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._end)]
        self._started: Any = None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _start(self, *_: object) -> None:
        self._started = self._mark()

    def _end(self, *_: object) -> None:
        self._marks.append((self._started, self._mark()))

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        marks, self._marks = self._marks, []
        if self._cuda:
            torch.cuda.synchronize()
            return sum(start.elapsed_time(end) for start, end in marks) / 1e3
        return sum(end - start for start, end in marks)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class Telemetry:
    """The run's record. All ranks call it alike; rank 0 writes.

    Args:
        run: run folder; gets metrics.jsonl and log.txt.
        row_tokens: R of the data.
        stage: the module whose forward passes are timed.
        precision: "fp32" or "bf16", for the peak in MFU.
        state: what `state()` returned when the checkpoint was made that the run resumes from.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        topology: Topology,
        *,
        row_tokens: int,
        stage: nn.Module,
        precision: str,
        start_step: int = 0,
        state: TelemetryState | None = None,
    ):
        self._config, self._topology = config, topology
        self._step_tokens = config.data.rows_per_step * row_tokens
        name = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else "cpu"
        self._peak = peak_flops(name, precision, config.telemetry.peak_tflops)
        self._forward = ForwardTimer(stage, topology.device)
        self.load(state or TelemetryState())
        self._window, self._pending = MetricSums(), MetricSums()
        self._window_steps, self._window_s, self._flops, self._skips, self._waited_before = 0, 0.0, 0.0, 0, 0.0
        self._step_started = time.perf_counter()
        self._sinks = Sinks(run, config, start_step) if topology.is_main else None
        self._first_start = self._sinks.first_start if self._sinks else 0.0

    def begin_step(self) -> None:
        """Call when the loop begins to wait for a step's data: the step's time counts from here."""
        self._step_started = time.perf_counter()

    def add(self, metrics: Mapping[str, Any], flops: float = 0.0) -> None:
        """Add a micro-batch of this rank: metrics as (sum, weight) by name, and its model FLOPs."""
        self._pending.add(metrics)
        self._flops += flops

    def end_step(
        self, step: int, loss: float, grad_norm: float, lr: float, wait_seconds: float, skipped: str | None = None
    ) -> None:
        """Step number `step` (from 0) is done; log it if it is time. Collective on logging steps.

        Args:
            wait_seconds: the loader's total so far.
            skipped: why the step changed nothing; its metrics are dropped, they may be nan.
        """
        seconds = time.perf_counter() - self._step_started
        self._window_steps += 1
        self._window_s += seconds
        if skipped is None:
            self._productive_s += seconds
            self._window.merge(self._pending)
        else:
            self._skips += 1
            self.event("skip", step=step, reason=skipped)
            self.say(f"step {step} skipped: {skipped}")
        self._pending = MetricSums()
        done = step + 1
        if done == 1 and self._config.train.log_every > 1:  # else nothing is seen for minutes
            self.say(f"step 1: loss {loss:.4g}, gradient norm {grad_norm:.3g}, {seconds:.2f} s")
        if done % self._config.train.log_every == 0 or done == self._config.train.steps:
            self._log(done, {"loss": loss, "grad_norm": grad_norm, "lr": lr}, wait_seconds)

    def _log(self, done: int, line: dict[str, Any], wait_seconds: float) -> None:
        metrics, per_rank = self._reduce(wait_seconds)
        step_s = self._window_s / self._window_steps
        world = self._topology.world_size
        line = {"kind": "train", "step": done, **line, **metrics}
        line |= {
            "step_s": step_s,
            "tokens_per_s": self._step_tokens / step_s,
            "tokens_per_s_per_device": self._step_tokens / step_s / world,
            "wait_share": statistics.fmean(per_rank["wait_s"]) / self._window_s,
            "peak_memory_gib": max(per_rank["memory"]) / GIB,
            "goodput": min(1.0, self._productive_s / max(time.time() - self._first_start, 1e-9)),
            "skipped": self._skips,
        }
        if self._peak and sum(per_rank["flops"]):
            line["mfu"] = sum(per_rank["flops"]) / self._window_s / (world * self._peak)
        stragglers = find_stragglers(per_rank["forward_s"], self._window_s)
        if stragglers:
            line["stragglers"] = stragglers
            self.say(f"slow ranks (times the median forward pass): {stragglers}")
        self._window, self._window_steps, self._window_s, self._flops, self._skips = MetricSums(), 0, 0.0, 0.0, 0
        if self._sinks:
            self._sinks.train(line, eta_s=(self._config.train.steps - done) * step_s)

    def _reduce(self, wait_seconds: float) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics over all ranks, and each rank's own measurements, by one all-reduce."""
        totals = self._window.totals()
        names = sorted(totals)
        wait_s, self._waited_before = wait_seconds - self._waited_before, wait_seconds
        own = {"wait_s": wait_s, "forward_s": self._forward.take(), "memory": _peak_memory(self._topology.device)}
        own["flops"] = self._flops
        world, rank = self._topology.world_size, self._topology.rank
        slots = [own[kind] if r == rank else 0.0 for kind in own for r in range(world)]
        reduced = all_reduce_sum([number for name in names for number in totals[name]] + slots)
        pairs, slots = reduced[: 2 * len(names)], reduced[2 * len(names) :]
        metrics = {name: total / weight for name, total, weight in zip(names, pairs[::2], pairs[1::2]) if weight}
        return metrics, {kind: slots[i * world : (i + 1) * world] for i, kind in enumerate(own)}

    def evaluation(
        self, step: int, metrics: Mapping[str, float], seconds: float, samples: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """Held-out figures of the weights after `step` updates, logged as eval/<name>, and generated texts."""
        if self._sinks:
            line = {"kind": "eval", "step": step, "seconds": seconds}
            self._sinks.evaluation(line | {f"eval/{name}": value for name, value in metrics.items()})
            for sample in samples:
                self._sinks.write({"kind": "sample", "step": step, **sample})
                self._sinks.say("".join(f"\n  {name:<12} {json.dumps(text)}" for name, text in sample.items())[1:])

    def event(self, name: str, **fields: Any) -> None:
        """A line of its own in metrics.jsonl: start, checkpoint, skip, rewind, requeue, end."""
        if self._sinks:
            self._sinks.write({"kind": "event", "event": name, **fields})

    def say(self, text: str) -> None:
        """A line for people, in the terminal and in log.txt."""
        if self._sinks:
            self._sinks.say(text)

    def state(self) -> TelemetryState:
        """What a checkpoint must carry."""
        return TelemetryState(productive_s=self._productive_s)

    def load(self, state: TelemetryState) -> None:
        """Go on from `state()` of a checkpoint: the steps made since then do not count."""
        self._productive_s = state.productive_s

    def close(self) -> None:
        """Flush everything."""
        self._forward.remove()
        if self._sinks:
            self._sinks.close()


def find_stragglers(seconds: Sequence[float], window_s: float) -> dict[str, float]:
    """Ranks whose time exceeds `STRAGGLER` medians, with the factor, if that costs a twentieth of the window."""
    median = statistics.median_low(seconds)
    bar = max(STRAGGLER * median, median + window_s / 20)
    return {str(rank): round(s / median, 2) for rank, s in enumerate(seconds) if s > bar and median > 0}


def _peak_memory(device: torch.device) -> float:
    """Peak memory in bytes: allocated on the device if it is a GPU, else resident in this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
