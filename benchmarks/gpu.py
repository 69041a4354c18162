"""Everything that is measured on a GPU, in one go; with --dry a miniature on the CPU that proves the script runs.

    python -m benchmarks.gpu --output figures.json
    python -m benchmarks.gpu --dry

`attention`: see attention.py, at segments of 4,096 tokens, where published figures are, and at 1,024, the longest window in training
(`attention_of_windows`). `matmul_peak_tflops`: the fastest of some large bf16 products. `head`: see lm_head.py. Per model (dit_xl,
vae_base), training in bf16 through the engine as a single ZeRO-1 rank, blocks compiled as configured, rows filled with windows of mixed
lengths, their layout made anew for every step, and for a DiT the frozen VAE's encoder before it:
`tokens_per_s`, `peak_memory_gb`, `step_s`; `mfu`, model FLOPs a second (attention by true segment lengths, no recomputation) over the
measured peak, and `mfu_of_data_sheet` over 989 TFLOP/s; `split`: seconds of a step in attention, GEMM, head, optimizer and rest. The
first three are timed alone on the step's own shapes, the optimizer within the step, rest is what remains. Left out against
pretrain/train.py: the loader, metrics, and REPA (vae_base).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import attention
from benchmarks.lm_head import Head
from benchmarks.measuring import print_figures, surroundings
from benchmarks.train_step import Products
from data_pipeline.core.errors import UserError, cli
from modeling import flow, losses
from modeling.attention import Segments
from modeling.text_dit import TextDiT, TextDiTConfig
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import Engine, EngineSettings
from pretrain.engine.optimizer_settings import AdamWSettings
from pretrain.ranks.distributed import init_distributed, shutdown
from pretrain.stages.base import StageOutput
from pretrain.stages.build import prepare_blocks
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.vae_config import VAERun
from pretrain.telemetry.flops import transformer_flops

DATA_SHEET_TFLOPS = 989.0
ROW_LENGTHS = [1024, 700, 1024, 324, 500, 300, 200, 24]
"""Windows of a row of 4,096 tokens."""


@dataclass(frozen=True)
class Size:
    """Sizes of what is measured: the shipped ones, or a miniature."""

    product: int = 8192
    lengths: tuple[int, ...] = tuple(ROW_LENGTHS)
    attention_lengths: tuple[int, ...] = (4096,) * 4
    window_lengths: tuple[int, ...] = (1024,) * 16
    head: tuple[int, int, int] = (4096, 768, 151_936)
    """Tokens, width, vocabulary."""
    attention_width: int = 2048
    steps: int = 10
    shape: tuple[tuple[str, int], ...] = ()

    @classmethod
    def dry(cls) -> "Size":
        """The miniature that --dry measures, in seconds on a CPU."""
        return cls(64, (20, 12, 1), (16, 8), (8, 8, 8), (256, 32, 16_384), 256, 2, (("width", 128), ("num_layers", 2)))


class SyntheticDiT(nn.Module):
    """Flow matching on a frozen VAE's latents of random tokens: a stage for the engine."""

    def __init__(self, config: TextDiTConfig, vae: TextVAE):
        super().__init__()
        self.dit = TextDiT(config)
        self._frozen = [vae.requires_grad_(False)]  # in a list it is no part of the stage
        self.layers, self.width, self.head_dim, self.vocab_size = config.num_layers, config.width, config.head_dim, 0

    def flops(self, lengths: list[int]) -> float:
        weights = 12 * self.width**2 * self.layers + 2 * self.width * self.dit.config.latent_dim
        vae = self._frozen[0].config
        encoder = 12 * vae.width**2 * vae.num_encoder_layers
        own = transformer_flops(weights, self.layers, self.width, lengths)
        return own + transformer_flops(encoder, vae.num_encoder_layers, vae.width, lengths, passes=1)

    def forward(self, segments: Segments, _: dict[str, int]) -> StageOutput:
        vae = self._frozen[0]
        tokens_T = torch.randint(vae.config.vocab_size, (segments.num_tokens,), device=segments.device)
        with torch.no_grad(), torch.autocast(segments.device.type, torch.bfloat16):
            data_TZ = vae.standardize(vae.encode(tokens_T, segments)[0])
        noise_TZ = torch.randn_like(data_TZ)
        time_T = torch.rand(len(segments.lengths), device=segments.device)[segments.ids_T]
        is_target_T = segments.positions_T >= 8
        noisy_TZ = flow.interpolate(data_TZ, noise_TZ, time_T[:, None])
        velocity_TZ = self.dit(
            torch.where(is_target_T[:, None], noisy_TZ, data_TZ), is_target_T, time_T, segments
        ).velocity_TZ
        error_T = losses.squared_error(velocity_TZ, flow.velocity(data_TZ, noise_TZ))
        return StageOutput((error_T * is_target_T).sum() / is_target_T.sum(), {})


class SyntheticVAE(nn.Module):
    """Reconstruction of random tokens: a stage for the engine, without REPA."""

    def __init__(self, config: TextVAEConfig):
        super().__init__()
        self.vae = TextVAE(config)
        self.layers, self.width = config.num_encoder_layers + config.num_decoder_layers, config.width
        self.vocab_size, self.head_dim = config.vocab_size, config.head_dim

    def flops(self, lengths: list[int]) -> float:
        shape = self.vae.config
        weights = 12 * self.width**2 * self.layers + self.width * (3 * shape.latent_dim + shape.vocab_size)
        return transformer_flops(weights, self.layers, self.width, lengths)

    def forward(self, segments: Segments, _: dict[str, int]) -> StageOutput:
        tokens_T = torch.randint(self.vocab_size, (segments.num_tokens,), device=segments.device)
        mean_TZ, log_variance_TZ, _hidden_TD = self.vae.encode(tokens_T, segments)
        latents_TZ = mean_TZ + (0.5 * log_variance_TZ).exp() * torch.randn_like(mean_TZ)
        decoded_TD, ones_T = self.vae.decode(latents_TZ, segments), torch.ones(len(tokens_T), device=segments.device)
        ce_sum, _ = losses.linear_cross_entropy(decoded_TD, self.vae.lm_head.weight, tokens_T, ones_T)
        kl = losses.kl_to_standard_normal(mean_TZ, log_variance_TZ).sum()
        return StageOutput((ce_sum + 1e-3 * kl) / len(tokens_T), {})


def seconds(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median time of a call, after one that does not count."""
    found = []
    for _ in range(repetitions + 1):
        _wait(device)
        started = time.perf_counter()
        function()
        _wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_peak(device: torch.device, size: Size) -> float:
    """FLOP/s of the fastest of three square bf16 products."""
    best = 0.0
    for n in (size.product // 2, size.product, 2 * size.product):
        left, right = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
        best = max(best, 2.0 * n**3 / seconds(lambda a=left, b=right: a @ b, device, 10))
    return best


def sized(name: str, size: Size) -> RunConfig:
    """A shipped configuration as it is, or with --dry its miniature."""
    config = load_config(name, [])
    for key, value in size.shape:
        keys = [key] if key != "num_layers" or config.stage == "dit" else ["num_encoder_layers", "num_decoder_layers"]
        for one in keys:
            setattr(config.model, one, value)  # type: ignore[attr-defined]
    if size.shape and isinstance(config, VAERun):
        config.model.vocab_size = 512
    return config


def train_figures(name: str, peak: float, device: torch.device, size: Size) -> dict[str, Any]:
    """Speed, memory and the step's split of one shipped configuration."""
    config = sized(name, size)
    config.train.compile = config.train.compile and device.type == "cuda"
    stage: SyntheticDiT | SyntheticVAE
    if isinstance(config, DiTRun):
        vae = sized("vae_base", size)
        assert isinstance(vae, VAERun)
        vae.model.latent_dim = config.model.latent_dim
        stage = SyntheticDiT(config.model.architecture(), TextVAE(vae.model.architecture()).to(device))
    else:
        assert isinstance(config, VAERun)
        stage = SyntheticVAE(config.model.architecture())
    prepare_blocks(stage.to(device), config.train)
    lengths = list(size.lengths) * (config.data.micro_batch_rows if not size.shape else 1)
    repetitions = size.steps
    engine = Engine(stage, EngineSettings(zero_stage=1, precision="bf16"), AdamWSettings(lr=1e-4), init_distributed())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = iter(range(1 << 30))
    update_s: list[float] = []

    def step() -> None:
        engine.forward_backward(Segments.from_lengths(lengths, device), {}, last=True)
        engine.measure()  # waits for the device
        started = time.perf_counter()
        engine.step(next(number), 1e-4)
        _wait(device)
        update_s.append(time.perf_counter() - started)

    step_s = seconds(step, device, repetitions)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    engine.close()
    split = {"optimizer": statistics.median(update_s[1:])} | parts(stage, lengths, device, repetitions)
    speed = stage.flops(lengths) / step_s
    return {
        "parameters": sum(p.numel() for p in stage.parameters()),
        "tokens_per_s": sum(lengths) / step_s,
        "tflops": speed / 1e12,
        "mfu": speed / peak,
        "mfu_of_data_sheet": speed / (DATA_SHEET_TFLOPS * 1e12),
        "peak_memory_gb": memory,
        "step_s": step_s,
        "split": split | {"rest": step_s - sum(split.values())},
    }


def parts(
    stage: SyntheticDiT | SyntheticVAE, lengths: list[int], device: torch.device, repetitions: int
) -> dict[str, float]:
    """Seconds that a step's attention, block GEMMs and LM head take alone, in bf16."""
    tokens, bf16 = sum(lengths), torch.bfloat16
    heads = stage.width // stage.head_dim
    one_pass = attention.Pass("auto", lengths, heads, stage.head_dim, device, bf16)
    products = Products(tokens, stage.width, stage.layers, device, bf16)
    found = {"attention": stage.layers * seconds(one_pass, device, repetitions)}
    found["gemm"] = seconds(products, device, repetitions)
    if stage.vocab_size:
        head = Head(tokens, stage.width, stage.vocab_size, device, bf16)
        found["head"] = seconds(head.chunked, device, repetitions)
    return found


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Attention, GEMM peak, training MFU on a GPU."
    )
    parser.add_argument("--dry", action="store_true", help="a miniature on the CPU, which says nothing about speed")
    parser.add_argument("--models", nargs="+", default=["dit_xl", "vae_base"], help="configurations (%(default)s)")
    parser.add_argument("--output", type=Path, help="also write the figures there")
    return parser


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        raise UserError("no GPU is here; --dry runs a miniature on the CPU")
    topology = init_distributed()
    device, size = (torch.device("cpu"), Size.dry()) if args.dry else (topology.device, Size())
    peak = matmul_peak(device, size)
    heads, width = [64, 128], size.attention_width
    figures: dict[str, Any] = {
        "device": "cpu" if args.dry else torch.cuda.get_device_name(device),
        "dry": args.dry,
        "matmul_peak_tflops": peak / 1e12,
        "attention": attention.measure(device, torch.bfloat16, heads, width, list(size.attention_lengths), size.steps),
        "attention_of_windows": attention.measure(
            device, torch.bfloat16, heads, width, list(size.window_lengths), size.steps
        ),
        "head": Head(*size.head, device, torch.bfloat16).figures(size.steps),
    }
    for name in args.models:
        figures[name] = train_figures(name, peak, device, size)
        print(json.dumps({name: figures[name]}), flush=True)
    shutdown()
    if args.output:
        args.output.write_text(json.dumps({**figures, **surroundings()}, indent=2) + "\n")
    print_figures(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
