"""How long a checkpoint holds up training, and how large it is.

    python -m benchmarks.checkpoint
    python -m benchmarks.checkpoint --config dit_b --folder /mnt/shared/tmp

The model is a shipped DiT's, with fewer layers where this machine's memory does not hold its states, its gradients and the host
copy. In turn: a save that training waits for, and one that goes on beside training steps.

`stall_over_blocking_save`: seconds for which an asynchronous save holds up the loop, over those of a blocking save of the same
state; medians of interleaved repetitions. `slowdown_over_blocking_save`: by how much longer the steps beside the writer take, all
together, over the same; without a GPU the writer's hashing shares the cores with training. `bytes_over_minimum`: bytes of a
checkpoint's folder over those of fp32 weights, two moments and EMA.
"""

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measuring import print_figures
from data_pipeline.core.errors import UserError, cli
from modeling.attention import Segments
from modeling.text_dit import TextDiT, TextDiTConfig
from pretrain.checkpoint.find import checkpoint_at, saved_steps
from pretrain.checkpoint.read import verify
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.config.load import load_config
from pretrain.engine.adamw import AdamW
from pretrain.engine.engine import Engine, EngineSettings
from pretrain.engine.optim import EMA, WEIGHT
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.ranks.distributed import init_distributed
from pretrain.stages.dit_config import DiTRun

STATES = (WEIGHT, *AdamW.states, EMA)
BYTES_PER_PARAMETER = 4 * (len(STATES) + 1 + len(STATES))
"""States, gradients, host copy."""
MEMORY_SHARE = 0.6
TOKENS = 256


class BareDiT(nn.Module):
    """A DiT on random latents: what matters here is its size."""

    def __init__(self, shape: TextDiTConfig) -> None:
        super().__init__()
        self.dit = TextDiT(shape)

    def forward(self, latents_TZ: Tensor, counts: dict[str, int]) -> SimpleNamespace:
        """Mean square of the velocity."""
        device = latents_TZ.device
        everywhere_T = torch.ones(len(latents_TZ), dtype=torch.bool, device=device)
        windows = Segments.from_lengths([len(latents_TZ)], device)
        velocity_TZ = self.dit(latents_TZ, everywhere_T, everywhere_T.float(), windows).velocity_TZ
        return SimpleNamespace(loss=velocity_TZ.square().sum() / counts["targets"], metrics={})


def shape_that_fits(name: str, available: float) -> TextDiTConfig:
    """The shape of a shipped DiT, with as many of its layers as `available` bytes hold. Raises: UserError."""
    config = load_config(name, [])
    if not isinstance(config, DiTRun):
        raise UserError(f"--config {name} is a configuration of stage {config.stage}; expected one of stage dit")
    shape = config.model.architecture()
    layers = int(available / (12 * shape.width**2 * BYTES_PER_PARAMETER))
    if layers < 1:
        raise UserError(f"not even one layer of {name} fits into {available / 1e9:.1f} GB; take a smaller --config")
    return replace(shape, num_layers=min(layers, shape.num_layers))


@dataclass
class Bench:
    """An engine in training with its writer; every save is of a new step."""

    engine: Engine
    writer: CheckpointWriter
    latents_TZ: Tensor
    step: int = 0

    def train(self) -> float:
        """Train one step; returns its seconds."""
        began = time.perf_counter()
        self.engine.forward_backward(self.latents_TZ, {"targets": len(self.latents_TZ)}, last=True)
        self.engine.step(self.step, lr=1e-4)
        self.step += 1
        return time.perf_counter() - began

    def blocking_save(self) -> dict[str, float]:
        """Seconds of a save that training waits for, and of a step alone."""
        alone_s = min(self.train() for _ in range(3))
        return {"blocking_s": self.writer.save(self.step, self.engine, {}, blocking=True), "alone_s": alone_s}

    def asynchronous_save(self) -> dict[str, float]:
        """Seconds for which the loop is held up, and of the steps beside the writer, of which there is at least one."""
        self.train()
        stall_s, beside = self.writer.save(self.step, self.engine, {}), [self.train()]
        while saved_steps(self.writer.run)[0] < self.step - len(beside):
            beside.append(self.train())
        self.writer.wait()
        return {"stall_s": stall_s, "beside_s": sum(beside), "beside_steps": len(beside)}


def measure(shape: TextDiTConfig, folder: Path, repetitions: int) -> dict[str, float]:
    """The figures, in a folder on the file system to be measured."""
    topology = init_distributed()
    torch.manual_seed(0)
    stage = BareDiT(shape).to(topology.device)
    engine = Engine(stage, EngineSettings(zero_stage=0), AdamWSettings(lr=3e-4), topology)
    writer = CheckpointWriter(folder, topology, keep_last=1)
    writer.prepare(engine)
    bench = Bench(engine, writer, torch.randn(TOKENS, shape.latent_dim, device=topology.device))
    found: dict[str, list[float]] = {}
    for repetition in tqdm(range(repetitions), desc="saves", dynamic_ncols=True):
        pair = [bench.blocking_save, bench.asynchronous_save]
        for save in pair if repetition % 2 == 0 else pair[::-1]:
            for name, value in save().items():
                found.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in found.items()}
    (step,) = saved_steps(folder)
    verify(checkpoint_at(folder, step))
    parameters = sum(parameter.numel for parameter in engine.partition.parameters.values())
    num_bytes = sum(file.stat().st_size for file in folder.rglob("step-*/*"))
    engine.close()
    return {
        "stall_over_blocking_save": median["stall_s"] / median["blocking_s"],
        "slowdown_over_blocking_save": (median["beside_s"] - median["beside_steps"] * median["alone_s"])
        / median["blocking_s"],
        "bytes_over_minimum": num_bytes / (4 * len(STATES) * parameters),
        "parameters": parameters,
        "checkpoint_gb": num_bytes / 1e9,
        "gb_per_s": num_bytes / 1e9 / median["blocking_s"],
        **median,
    }


@cli
def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint", description="What a checkpoint costs, in time and in bytes."
    )
    parser.add_argument("--config", default="dit_xl", help="a DiT's configuration (%(default)s, 767M parameters)")
    parser.add_argument("--folder", type=Path, help="on the file system to be measured (that of temporary files)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each kind of save (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.repetitions < 1:
        raise UserError(f"--repetitions {arguments.repetitions}: expected at least 1")
    shape = shape_that_fits(arguments.config, MEMORY_SHARE * psutil.virtual_memory().available)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="checkpoint-benchmark-") as folder:
        print_figures(measure(shape, Path(folder), arguments.repetitions))


if __name__ == "__main__":
    sys.exit(main(None))
