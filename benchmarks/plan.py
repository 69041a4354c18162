"""How near `textldm plan` comes to what is measured: memory of states and activations, time of a step.

    python -m benchmarks.plan

`states_ratio`: planned over measured bytes of weights, gradients and states (with what is there until the step) on two ranks under
DeepSpeed on CPU: ZeRO 0 to 3 in fp32, 1 to 3 in bf16. Measured are the storages of all tensors alive when gradients are complete.
`activation_ratio`: planned over measured peak of a forward and backward pass, from the allocator's own record (torch's profiler).
`time_ratio`: planned over measured seconds of processor time of a training step on one thread; planned are FLOPs at the rate of plain
matrix products, and bytes moved outside of them at the rate of a GELU, its gradient and a sum, both measured in the same process.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.multiprocessing as mp
from torch._subclasses.fake_tensor import FakeTensor

from benchmarks.measuring import print_figures
from benchmarks.train_step import Products
from data_pipeline.core.errors import cli
from pretrain.config.load import load_config
from pretrain.engine.optim import build_optimizer
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.plan.activations import set_recomputation, trace
from pretrain.plan.estimate import Text, outline_of
from pretrain.plan.rank import PASSING, plan_rank
from pretrain.stages.outline import Outline, Windows

Case = tuple[Literal["fp32", "bf16"], Literal[0, 1, 2, 3]]
"""A precision and a ZeRO stage."""
STATES: list[Case] = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
RANKS, VOCABULARY = 2, 2000
SMALL = ("model.width=192", "model.num_layers=3")
MODELS = {
    "dit": ("dit_b", SMALL, 0),
    "dit, recomputed": ("dit_b", SMALL, 1),
    "dit_categorical": ("dit_b_categorical", SMALL, 0),
    "vae": ("vae_base", ("model.width=192", "model.num_encoder_layers=2", "model.num_decoder_layers=2", "model.vocab_size=2000"), 0),
    "ar": ("ar_b", (*SMALL, "model.vocab_size=2000"), 0),
    "mdlm, every second": ("mdlm_b", (*SMALL, "model.vocab_size=2000"), 2),
}  # fmt: skip
"""Configuration, overrides, train.activation_checkpointing."""
STEPS = {"ar 256x2": (256, 2), "ar 256x4": (256, 4), "ar 384x2": (384, 2), "ar 384x4": (384, 4)}
"""Width and layers."""


def outline(config: str, overrides: tuple[str, ...], device: str) -> Outline:
    """Of a small model on a device."""
    return outline_of(load_config(config, overrides), torch.device(device), VOCABULARY)


class Whole(torch.nn.Module):
    """A stage that trains an outline's model."""

    def __init__(self, model: Outline) -> None:
        super().__init__()
        self.model, self._loss = model.trained, model.loss

    def forward(self, windows: Windows, counts: dict[str, int]) -> SimpleNamespace:
        """The loss of a micro-batch."""
        return SimpleNamespace(loss=self._loss(windows), metrics={})


def live_tensors(and_garbage: bool = False) -> list[torch.Tensor]:
    """All that the collector knows, without those of shapes alone that a compilation or a test left behind."""
    gc.unfreeze()  # the engine hides from the collector what was there before it, garbage too
    if not and_garbage:
        gc.collect()  # half a second, of all that was imported
    every = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return [tensor for tensor in every if not isinstance(tensor, FakeTensor) and _has_memory(tensor)]


def _has_memory(tensor: torch.Tensor) -> bool:
    """False for what stands for a tensor while a function is traced, whose storage nobody may ask for its place."""
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def live_bytes(known: set[int]) -> int:
    """Bytes of all storages that tensors hold, without those whose addresses are known."""
    found: dict[int, int] = {}
    for tensor in live_tensors():
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None and one.device.type == "cpu":
                storage = one.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in found.items() if address not in known)


def measure_states(rank: int, port: int, cases: list[Case], file: str) -> None:
    """On one of two ranks: bytes on rank 0 of each case, when its gradients are complete."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_SIZE": str(RANKS),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    from pretrain.engine.engine import Engine, EngineSettings
    from pretrain.ranks.distributed import init_distributed, shutdown

    torch.set_num_threads(1)
    topology, found, kept = init_distributed(300), [], []
    for precision, stage in cases:
        # What an earlier case left stays alive, so that no new storage has its address.
        kept += [tensor.detach() for tensor in live_tensors(and_garbage=True)] if rank == 0 else []
        known = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.device.type == "cpu"}
        model = outline(*MODELS["ar"][:2], "cpu")
        engine = Engine(
            Whole(model), EngineSettings(zero_stage=stage, precision=precision), AdamWSettings(lr=1e-3), topology
        )
        for step in range(2):
            engine.forward_backward(Windows([8]), {}, last=True)
            engine.measure()
            if rank == 0 and step == 1:
                found.append(live_bytes(known))
            engine.step(step, 1e-3)
        engine.close()
    if rank == 0:
        Path(file).write_text(json.dumps(found))
    shutdown()


def states_ratios(cases: list[Case]) -> list[float]:
    """Planned over measured, of each case."""
    from pretrain.ranks.launcher import free_port

    with TemporaryDirectory() as folder:
        file = f"{folder}/bytes.json"
        mp.start_processes(measure_states, (free_port(), cases, file), nprocs=RANKS, start_method="forkserver")
        measured = json.loads(Path(file).read_text())
    return [planned_states(*case, RANKS) / bytes_ for case, bytes_ in zip(cases, measured, strict=True)]


def planned_states(precision: str, stage: int, ranks: int) -> int:
    """Bytes on the first rank between steps, as `train.py --dry-run --as-rank` says them."""
    name, overrides, _ = MODELS["ar"]
    rows = ("data.streams=2", "data.rows_per_step=2", "data.micro_batch_rows=2")
    sharding = (f"train.precision={precision}", f"train.zero_stage={stage}")
    plan = plan_rank(load_config(name, (*overrides, *rows, *sharding)), 0, ranks, Text(64, 64), VOCABULARY)
    return sum(size for kind, size in plan.memory.items() if kind not in PASSING)


def measured_peak(model: Outline, windows: Windows, every: int) -> int:
    """Bytes at the highest point of a forward and backward pass, beyond weights and gradients, by the allocator's record."""
    model.trained.train()
    set_recomputation(model, every)
    for p in model.trained.parameters():
        p.grad = torch.zeros_like(p)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        model.loss(windows).backward()
    assert profiler.profiler is not None
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def activation_ratio(config: str, overrides: tuple[str, ...], every: int, windows: Windows) -> float:
    """Planned over measured."""
    planned = trace(outline(config, overrides, "meta"), windows, bf16=False, checkpoint_every=every, sdpa=True)
    return planned.peak_bytes / measured_peak(outline(config, overrides, "cpu"), windows, every)


def seconds(function: Callable[[], object], repetitions: int = 3) -> float:
    """The least processor time of a few calls, after one that pays for what only the first one does."""
    function()
    times = []
    for _ in range(repetitions):
        started = time.process_time()
        function()
        times.append(time.process_time() - started)
    return min(times)


def moving_rate(tokens: int, width: int) -> float:
    """Bytes a second of what lies between matrix products: a GELU, its gradient and a sum over an MLP's hidden states."""
    x_TD = torch.randn(tokens, 4 * width, requires_grad=True)
    grad_TD = torch.randn(tokens, 4 * width)

    def both() -> None:
        torch.autograd.grad(torch.nn.functional.gelu(x_TD, approximate="tanh"), x_TD, grad_TD)[0] + grad_TD

    return 8 * 4 * x_TD.numel() / seconds(both)


def time_ratio(width: int, layers: int, windows: Windows) -> float:
    """Planned over measured, of a step of the causal model with AdamW and EMA."""
    overrides = (f"model.width={width}", f"model.num_layers={layers}", "model.vocab_size=2000")
    model = outline("ar_b", overrides, "cpu")
    optimizer = build_optimizer(model.trained.train(), AdamWSettings(lr=1e-4))

    def step() -> None:
        model.loss(windows).backward()
        optimizer.prepare(1, 1e-4, 0.99)
        optimizer.step()
        optimizer.zero_grad()

    products = Products(windows.num_tokens, width, layers)
    rate, moving = products.flops() / seconds(products), moving_rate(windows.num_tokens, width)
    planned = outline("ar_b", overrides, "meta")
    moved = trace(planned, windows, bf16=False, sdpa=True).moved_bytes
    updated = (
        4 * 12 * sum(p.numel() for p in planned.trained.parameters())
    )  # weight, gradient and three states, in and out
    return (planned.flops(windows) / rate + (moved + updated) / moving) / seconds(step)


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description="textldm plan against measurements.")
    parser.add_argument("--part", choices=("all", "states", "activations", "times"), default="all")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    part = main_parser().parse_args(argv).part
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    windows = Windows([160] * 4)
    if part in ("all", "times"):
        figures["time_ratio"] = [round(time_ratio(*size, windows), 3) for size in STEPS.values()]
        figures["time_of"] = list(STEPS)
    if part in ("all", "activations"):
        figures["activation_ratio"] = [round(activation_ratio(*model, windows), 4) for model in MODELS.values()]
        figures["activation_of"] = list(MODELS)
    if part in ("all", "states"):
        figures["states_ratio"] = [round(ratio, 4) for ratio in states_ratios(STATES)]
        figures["states_of"] = [f"{precision}, ZeRO {stage}" for precision, stage in STATES]
    print_figures(figures)


if __name__ == "__main__":
    sys.exit(main())
