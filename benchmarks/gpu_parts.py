"""What benchmarks/gpu.py measures, part by part: each is a generator of rows, so that what was measured is there whatever comes after.

`card`: bf16 products (the best is the peak behind `MFU of the peak`), copies on the device and to it from pinned memory.
`training`: shipped configurations through their own stages and the engine, one rank of the eight that they are written for, in the
order of pretrain/train.py's loop, on random tokens in windows of mixed lengths, compiled as configured. A DiT's frozen VAE has random
weights, vae_base's teacher is a cache of random codes. MFU: as in docs/engine.md.
`split`: of three of those steps, by the names of the kernels that torch's profiler saw; `idle` is what remains of their time.
`attention`: see attention.py. `losses`: see lm_head.py. `encoder`: the frozen VAE's, as stage 2 asks for latents.
`loader`: shards of random tokens through the loader as configured, alone and with copies to the device.
"""

import functools
import itertools
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks import attention
from benchmarks.lm_head import Categorical, Head, peak_bytes
from benchmarks.loader import random_folder
from data_pipeline.features.codec import FeatureCodec
from data_pipeline.features.ngram_means import NgramMeans
from data_pipeline.reading.batch import Batch, CodedFeatures, RowBlock, RowId
from data_pipeline.reading.loader import TrainLoader
from modeling.attention import IMPLEMENTATIONS, Segments, implementations
from modeling.floors import Floors
from modeling.heads import CategoricalHead
from modeling.repa import RepaHead
from modeling.text_vae import TextVAE
from pretrain.config.load import load_config
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.engine.engine import Engine, EngineSettings
from pretrain.ranks.distributed import init_distributed
from pretrain.stages.blocks import prepare_blocks
from pretrain.stages.dit import DiTStage
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.frozen_vae import posterior, training_encoder
from pretrain.stages.latent_statistics import LatentStatistics
from pretrain.stages.repa_target import CachedFeatures
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun
from pretrain.telemetry.flops import peak_flops

RANKS = 8
"""For so many the configurations are written: a rank's share of a step's rows is accumulated, as it would be there."""
HEAD_DIMS = (64, 128)
FEATURE_DIM, CODE_LEVELS = 2048, (16,) * 40 + (4,) * 60
BF16 = torch.bfloat16

# Names of rows, which benchmarks/gpu.py expects.
PRODUCTS = tuple(f"bf16 product of {n}, TFLOP/s" for n in ("4,096", "8,192", "16,384"))
COPIES = ("read and written on the device, GB/s", "from pinned memory to the device, GB/s")
LAYOUTS = ("4 x 4,096", "16 x 1,024")
LOSSES = (
    "LM head in chunks", "LM head, all logits", "LM head by liger-kernel", "categorical in chunks",
    "categorical, gradients through the mean", "categorical, all logits",
)  # fmt: skip
ENCODERS = ("fp32 weights under autocast", "bf16 weights", "bf16 weights, compiled")
SPLIT = "split: "
LOADERS = ("as configured, in pinned memory", "and on the device")


@dataclass(frozen=True)
class Size:
    """Sizes of what is measured: the shipped ones, or a miniature."""

    product: int = 8192
    copied_bytes: int = 1 << 28
    row_tokens: int = 2048
    shape: tuple[tuple[str, int], ...] = ()
    """Keys of section model, instead of the shipped values."""
    attention: tuple[tuple[int, ...], ...] = ((4096,) * 4, (1024,) * 16)
    """Lengths of segments, for each of `LAYOUTS`."""
    attention_width: int = 2048
    head: tuple[int, int, int] = (4096, 768, 151_936)
    """Tokens, width, vocabulary."""
    shards: tuple[int, int] = (4, 256)
    """Shards and rows of each, for the loader."""
    accumulate: bool = True
    warmup: int = 3
    steps: int = 10

    @classmethod
    def dry(cls) -> "Size":
        """The miniature that --dry runs on a CPU."""
        shape = (
            ("width", 64),
            ("num_layers", 1),
            ("num_encoder_layers", 1),
            ("num_decoder_layers", 1),
            ("head_dim", 32),
        )
        layouts = ((16, 8), (8, 8, 8))
        sizes: dict[str, Any] = {
            "head": (64, 16, 4096),
            "shards": (2, 16),
            "accumulate": False,
            "warmup": 1,
            "steps": 2,
        }
        return cls(64, 1 << 16, 64, (*shape, ("vocab_size", 512)), layouts, 128, **sizes)


@dataclass(frozen=True)
class Row:
    """A measured row of a table: its name and its figures."""

    name: str
    figures: list[Any]


@dataclass(frozen=True)
class Missing:
    """A row for which there is no figure, and why."""

    name: str
    why: str


Rows = Iterator[Row | Missing]


def seconds(function: Callable[[], object], device: torch.device, repetitions: int) -> float:
    """Median time of a call, after one that does not count."""
    found = []
    for _ in range(repetitions + 1):
        wait(device)
        started = time.perf_counter()
        function()
        wait(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def wait(device: torch.device) -> None:
    """Until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digits(value: float, significant: int = 4) -> float:
    """A figure with as many digits as it is worth."""
    return float(f"{value:.{significant}g}")


def card(device: torch.device, size: Size) -> Rows:
    """TFLOP/s of products, GB/s of copies."""
    for name, n in zip(PRODUCTS, products(size)):
        yield Row(name, [digits(product_rate(n, device) / 1e12)])
    on_device = torch.empty(size.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(on_device)
    rate = 2 * size.copied_bytes / seconds(lambda: target.copy_(on_device), device, size.steps)
    yield Row(COPIES[0], [digits(rate / 1e9)])
    on_host = torch.empty(size.copied_bytes, dtype=torch.uint8)
    on_host = on_host.pin_memory() if device.type == "cuda" else on_host
    rate = size.copied_bytes / seconds(lambda: target.copy_(on_host, non_blocking=True), device, size.steps)
    yield Row(COPIES[1], [digits(rate / 1e9)])


def products(size: Size) -> tuple[int, ...]:
    """Rows of the square matrices that are multiplied."""
    return size.product // 2, size.product, 2 * size.product


def product_rate(n: int, device: torch.device) -> float:
    """FLOP/s of a square bf16 product."""
    left, right = torch.randn(2, n, n, device=device, dtype=BF16)
    return 2.0 * n**3 / seconds(lambda: left @ right, device, 10)


class OnRandomLatents(DiTStage):
    """Stage 2 as it is, on a VAE of random weights: speed does not depend on them."""

    @staticmethod
    def frozen(config: DiTRun, manifest: Any) -> tuple[TextVAE, LatentStatistics]:
        with torch.device(manifest.device):
            vae = TextVAE(manifest.vae).eval().requires_grad_(False)
            head = CategoricalHead(8, manifest.vae.latent_dim, manifest.vae.vocab_size)
            tokens = {name: torch.rand_like(buffer) for name, buffer in head.named_buffers()}
            ones_Z, log_V = torch.ones(manifest.vae.latent_dim), torch.zeros(manifest.vae.vocab_size)
        return vae, LatentStatistics(0 * ones_Z, ones_Z, Floors(ones_Z, 0.1), log_V, tokens)


def configured(name: str, size: Size) -> Any:
    """A shipped configuration as it is, or its miniature."""
    config: Any = load_config(name, [])
    for key, value in size.shape:
        if hasattr(config.model, key):
            setattr(config.model, key, value)
    return config


def stage_of(config: RunConfig, device: torch.device, size: Size) -> Any:
    """The configuration's stage on the device, its blocks prepared as pretrain/stages/build.py does it."""
    frozen = configured("vae_base", size).model.architecture()
    tokenizer = SimpleNamespace(vocab_size=frozen.vocab_size, eos_id=0)
    manifest: Any = SimpleNamespace(tokenizer=tokenizer, max_window=1024, vae=frozen, device=device)
    stage: Any
    if isinstance(config, DiTRun):
        frozen.latent_dim = config.model.latent_dim
        stage = OnRandomLatents(config, manifest, device)
    elif isinstance(config, VAERun):
        config.repa.features = ""  # none to be read, but those that come with the batches
        stage = VAEStage(config, manifest, device)
        with device:
            stage.target, stage.repa = CachedFeatures(random_codec(device)), RepaHead(frozen.width, FEATURE_DIM)
    else:
        stage = stage_kind(config.stage).load("stage")(config, manifest, device)
    prepare_blocks(stage, config.train)
    return stage.to(device)


def random_codec(device: torch.device) -> FeatureCodec:
    """As that of a teacher of Qwen3-1.7B's width."""
    with torch.device(device):
        keys = [torch.zeros(1000, dtype=torch.int64) for _ in range(2)]
        means = [torch.zeros(1001, FEATURE_DIM, dtype=torch.float16) for _ in range(2)]
        ngrams, basis_KF = NgramMeans(1 << 20, keys, means), torch.randn(len(CODE_LEVELS), FEATURE_DIM)
        return FeatureCodec(torch.zeros(FEATURE_DIM), basis_KF, torch.ones(len(CODE_LEVELS)), CODE_LEVELS, ngrams)


def random_batch(config: RunConfig, rows: int, vocab_size: int, number: int, size: Size) -> Batch:
    """Random tokens in windows as long as web text's, split as configured; pinned where there is a GPU."""
    rng, lengths, counts = np.random.default_rng(number), [], []
    for _ in range(rows):
        of_row, space = [], size.row_tokens
        while space >= 16:
            of_row.append(min(1024, space, max(8, int(rng.lognormal(6, 1)))))
            space -= of_row[-1]
        lengths += of_row
        counts.append(len(of_row))
    tokens_BR = rng.integers(1, vocab_size, (rows, size.row_tokens))
    ids = [RowId(number * rows + row, "train", 0, row, 0) for row in range(rows)]
    batch = RowBlock(tokens_BR, np.array(lengths), np.array(counts), ids, 0, config.data.split).batch(0, rows)
    if config.stage == "vae":
        num_tokens, width = rows * size.row_tokens, random_codec(torch.device("cpu")).num_code_bytes
        codes = torch.from_numpy(rng.integers(0, 255, (num_tokens, width), np.uint8))
        batch = replace(batch, features=CodedFeatures(codes, torch.ones(num_tokens, dtype=torch.uint8)))
    return batch.pin_memory() if torch.cuda.is_available() else batch


def training(name: str) -> Callable[[torch.device, Size], Rows]:
    """The part of one configuration: its rows in the tables `training` and `split`."""

    def measured(device: torch.device, size: Size) -> Rows:
        config = configured(name, size)
        config.train.compile = config.train.compile and device.type == "cuda"
        stage, rows = stage_of(config, device, size), config.data.micro_batch_rows if size.accumulate else 1
        micro_batches = config.data.rows_per_step // RANKS // rows if size.accumulate else 1
        vocab_size = configured("vae_base", size).model.vocab_size
        batches = [random_batch(config, rows, vocab_size, number, size) for number in range(3 * micro_batches)]
        settings = EngineSettings.of(config.train, precision="bf16", accumulation_steps=micro_batches)
        engine = Engine(stage, settings, config.optimizer, init_distributed())
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        def step(number: int) -> float:
            """One of the loop's; returns when the host knew its loss."""
            at = number % 3 * micro_batches
            of_step = batches[at : at + micro_batches]
            counts: dict[str, int] = defaultdict(int)
            for batch in of_step:
                for key, count in stage.token_counts(batch).items():
                    counts[key] += count
            for index, batch in enumerate(of_step):
                on_device = batch.to(device, non_blocking=True)
                engine.forward_backward(on_device, counts, last=index == micro_batches - 1)
            engine.measure()
            known = time.perf_counter()
            engine.step(number, 1e-4)
            return known

        started = time.perf_counter()
        first_s = step(0) - started
        known = [step(number) for number in range(1, size.warmup + size.steps + 1)][size.warmup - 1 :]
        step_s = statistics.median(after - before for before, after in itertools.pairwise(known))
        memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
        speed = sum(stage.flops(batch) for batch in batches) / 3 / step_s
        peak = max(product_rate(n, device) for n in products(size))
        card_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        of_data_sheet = peak_flops(card_name, "bf16")
        yield Row(
            name,
            [
                sum(p.numel() for p in stage.parameters()),
                round(micro_batches * rows * size.row_tokens / step_s),
                digits(speed / 1e12),
                digits(speed / of_data_sheet, 3) if of_data_sheet else None,
                digits(speed / peak, 3),
                digits(1e3 * step_s),
                digits(memory),
                digits(first_s, 3),
            ],
        )
        yield split_of(name, step, size, device)
        engine.close()

    return measured


KINDS = {
    "attention": r"flash|fmha|_attn|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitK|_mm_|\bmm\b|addmm",
    "optimizer": r"multi_tensor|fused_adam|foreach",
    "compiled": r"triton|inductor",
    "copies": r"memcpy|memset|copy",
    "communication": r"nccl|gloo|c10d",
}
"""Kernels' kinds by their names; the first that fits."""


def kind_of(kernel: str) -> str:
    """What a kernel is there for."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def split_of(name: str, step: Callable[[int], float], size: Size, device: torch.device) -> Row | Missing:
    """Milliseconds of a step by kind of kernel, as torch's profiler saw three of them."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    numbers = [size.warmup + size.steps + 1 + number for number in range(3)]
    with torch.profiler.profile(activities=[activity]) as profiler:
        started = time.perf_counter()
        for number in numbers:
            step(number)
        wait(device)
        step_s = (time.perf_counter() - started) / 3
    spent: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key)
        spent[kind] += microseconds / 3e3
        if kind == "other":
            others[event.key] += microseconds / 3e3
    if not sum(spent.values()):
        return Missing(SPLIT + name, "the profiler saw no kernel (has this container leave to read counters?)")
    idle = 1e3 * step_s - sum(spent.values())
    most = max(others, key=lambda one: others[one], default="")[:60]
    figures = [digits(spent[kind], 3) for kind in [*KINDS, "other"]]
    return Row(SPLIT + name, [*figures, digits(idle, 3), digits(1e3 * step_s), most])


def attention_rows(device: torch.device, size: Size) -> Rows:
    """Forward and backward, by kernel, head dimension and layout."""
    here = implementations(device.type, BF16)
    for name in IMPLEMENTATIONS:
        for head_dim in HEAD_DIMS:
            rows = [f"{name}, head dim {head_dim}, {layout}" for layout in LAYOUTS]
            if name not in here:
                yield from (Missing(row, f"{name} is not to be had here") for row in rows)
                continue
            layouts = attention.LAYOUTS.values()
            errors = [attention.errors(name, lengths, head_dim, device, BF16) for lengths in layouts]
            largest = max(max(error.values()) for error in errors)
            for row, lengths in zip(rows, size.attention):
                heads = max(size.attention_width // head_dim, 1)
                one = attention.Pass(name, list(lengths), heads, head_dim, device, BF16)
                spent = seconds(one, device, size.steps)
                yield Row(row, [digits(one.flops / spent / 1e12), digits(1e3 * spent), digits(largest, 2)])


def loss_rows(device: torch.device, size: Size) -> Rows:
    """Forward and backward of the losses over the vocabulary."""
    head = Head(*size.head, device, BF16)
    categorical = Categorical(*size.head, 64, device, BF16)
    runs = (head.chunked, head.naive, head.liger, categorical.chunked, categorical.through, categorical.naive)
    for name, run in zip(LOSSES, runs, strict=True):
        try:
            run()
        except ImportError as error:
            yield Missing(name, str(error))
            continue
        peak = peak_bytes(run, device)
        yield Row(name, [digits(1e3 * seconds(run, device, size.steps)), digits(peak / 1e9)])


def encoder_rows(device: torch.device, size: Size) -> Rows:
    """The frozen encoder on a micro-batch of dit_b: as diagnosis computes it, and as training does."""
    config = configured("dit_b", size)
    vae, rows = stage_of(config, device, size).vae, config.data.micro_batch_rows if size.accumulate else 1
    batch = random_batch(config, rows, vae.config.vocab_size, 0, size).to(device)
    plain, compiled = config.train.model_copy(update={"compile": False}), config.train
    compiled.compile = device.type == "cuda"
    with torch.no_grad():
        exact_TZ = vae.encode(batch.tokens_T, Segments.from_lengths(batch.segment_lengths, device))[0]
    for name, train in zip(ENCODERS, (None, plain, compiled), strict=True):
        encoder = vae if train is None else training_encoder(vae, train, device)
        error = (posterior(encoder, batch)[0] - exact_TZ).square().mean().sqrt() / exact_TZ.std()
        spent = seconds(functools.partial(posterior, encoder, batch), device, size.steps)
        yield Row(name, [round(rows * size.row_tokens / spent), digits(1e3 * spent), digits(float(error), 2)])


def loader_rows(device: torch.device, size: Size) -> Rows:
    """Tokens a second out of shards in the page cache."""
    config = configured("dit_b", size)
    data = config.data
    rows, streams, per_step = (
        (data.micro_batch_rows, data.streams, data.rows_per_step) if size.accumulate else (1, 2, 2)
    )
    row_tokens = max(size.row_tokens, 1024)  # a window's most
    with tempfile.TemporaryDirectory() as folder:
        random_folder(Path(folder) / "data", *size.shards, row_tokens, copies=max(1, streams // size.shards[0]))
        for name, to_device in zip(LOADERS, (False, True)):
            loader = TrainLoader(
                str(Path(folder) / "data"), None, seed=0, streams=streams, rows_per_step=per_step, micro_batch_rows=rows,
                split=data.split, workers=data.workers, pin_memory=device.type == "cuda",
                rank=0, world_size=min(RANKS, streams),
            )  # fmt: skip
            with loader:
                tokens, copied = 0, []
                loader.next_step()
                started = time.perf_counter()
                for _ in range(4 * size.steps):
                    for batch in loader.next_step():
                        tokens += len(batch.tokens_T)
                        if to_device:
                            copied = [batch.to(device, non_blocking=True)]
                wait(device)
                del copied
                yield Row(name, [round(tokens / (time.perf_counter() - started))])
