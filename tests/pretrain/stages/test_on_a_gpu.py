"""Both stages of the paper at their shipped shapes on a pretend GPU: devices do not mix, and the host never waits (pretend_gpu.py)."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.features import quantise
from data_pipeline.features.codec import FeatureCodec
from data_pipeline.features.ngram_means import NgramMeans
from data_pipeline.reading.batch import Batch, CodedFeatures, RowBlock, RowId
from modeling import attention, losses
from modeling.floors import Floors
from modeling.heads import CategoricalHead
from modeling.repa import RepaHead
from modeling.text_vae import TextVAE, TextVAEConfig
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.stages import base, dit, vae
from pretrain.stages.latent_statistics import LatentStatistics
from pretrain.stages.repa_target import CachedFeatures
from tests.pretrain.pretend_gpu import CUDA, META, PretendGPU

FEATURE_DIM, ROW_TOKENS, LATENT_DIM = 2048, 4096, 64
VOCABULARY = 151_936
LEVELS = (16,) * 40 + (4,) * 60


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """A pretend GPU, on which attention is torch's own kernel and the compiler is left out."""
    monkeypatch.setattr(attention, "choose_implementation", lambda *_: "torch_varlen")
    monkeypatch.setattr(losses, "_compiled_loss_of_chunk", lambda: losses.loss_of_chunk)
    monkeypatch.setattr(base.torch, "Generator", lambda _: torch._C.Generator())
    mode = PretendGPU()
    with mode:
        mode.is_strict = False
        for levels in set(LEVELS):  # tables that are put on the device once
            quantise._byte_values(levels, len(LEVELS), CUDA)
        mode.is_strict = True
    yield mode
    quantise._byte_values.cache_clear()  # which keeps what it put there


def batch_of(config: RunConfig) -> Batch:
    """A micro-batch of the configured size: windows of up to 1,024 tokens, and a filler tail in each row."""
    rows, windows = config.data.micro_batch_rows, [1024, 700, 324, 500, 300, 200, 24, 1000]
    ids = [RowId(ticket, "train", 0, ticket, 0) for ticket in range(rows)]
    tokens_BR = np.random.default_rng(0).integers(1, VOCABULARY, (rows, ROW_TOKENS))
    lengths, counts_B = np.array(windows * rows, np.int64), np.full(rows, len(windows))
    batch = RowBlock(tokens_BR, lengths, counts_B, ids, 0, config.data.split).batch(0, rows)
    if config.stage == "vae":
        num_tokens = rows * ROW_TOKENS
        codes = torch.zeros(num_tokens, _codec("cpu").num_code_bytes, dtype=torch.uint8)
        batch = replace(batch, features=CodedFeatures(codes, torch.zeros(num_tokens, dtype=torch.uint8)))
    return batch


def _codec(device: str) -> FeatureCodec:
    with torch.device(device):
        mean_F, basis_KF = torch.zeros(FEATURE_DIM), torch.zeros(len(LEVELS), FEATURE_DIM)
        keys = [torch.zeros(1000, dtype=torch.int64)] * 2
        ngrams = NgramMeans(VOCABULARY, keys, [torch.zeros(1001, FEATURE_DIM, dtype=torch.float16)] * 2)
        return FeatureCodec(mean_F, basis_KF, torch.ones(len(LEVELS)), LEVELS, ngrams)


def vae_stage(config: RunConfig) -> vae.VAEStage:
    """As it trains in bf16, on the device, aligned with cached features."""
    config.repa.features = ""  # type: ignore[attr-defined]
    with META:
        stage = vae.VAEStage(config, SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=VOCABULARY)), META)  # type: ignore[arg-type]
        stage.target, stage.repa = CachedFeatures(_codec("meta")), RepaHead(stage.vae.config.width, FEATURE_DIM)
    return stage.bfloat16()


def dit_stage(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> dit.DiTStage:
    """As it trains in bf16, on the device, with a frozen VAE."""
    with META:
        frozen = TextVAE(TextVAEConfig(vocab_size=VOCABULARY)).eval().requires_grad_(False)
        numbers_Z, numbers_V = torch.zeros(LATENT_DIM), torch.zeros(VOCABULARY)
        tokens = dict(CategoricalHead(8, LATENT_DIM, VOCABULARY).named_buffers())
        statistics = LatentStatistics(numbers_Z, numbers_Z, Floors(numbers_Z, 0.1), numbers_V, tokens)
        monkeypatch.setattr(dit, "load_vae", lambda *_: frozen)
        monkeypatch.setattr(dit.LatentStatistics, "load", lambda _: statistics)
        return dit.DiTStage(config, SimpleNamespace(), META).bfloat16()  # type: ignore[arg-type]


def built(name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Any]:
    """A shipped configuration and its stage."""
    config = load_config(name, settings)
    return config, vae_stage(config) if config.stage == "vae" else dit_stage(config, monkeypatch)


RECIPES = {
    "vae_base": ("vae_base", []),
    "dit_b": ("dit_b", []),
    "dit_b_categorical": ("dit_b_categorical", ["flow.through_tokens=true"]),
    "every switch": (
        "dit_b",
        [
            "flow.target=sample", "flow.time_spread=0.5", "flow.token_loss_weight=0.1", "model.self_conditioning=true",
            "model.time_conditioning=adaln_zero", "model.role_embedding=true", "model.qk_norm=true",
            "train.activation_checkpointing=2",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), RECIPES.values(), ids=RECIPES)
def test_a_step_on_a_gpu_mixes_no_devices_and_lets_the_host_go_on(
    gpu: PretendGPU, name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, stage = built(name, settings, monkeypatch)
    batch = batch_of(config)
    with gpu:
        on_device = batch.pin_memory().to("cuda", non_blocking=True)
        of_the_batch = len(gpu.copies)
        counts = {name: max(count, 1) for name, count in stage.token_counts(batch).items()}
        output = stage.train()(on_device, counts)
        output.loss.backward()
    assert {metric.is_meta for metric in output.metrics.values()} == {True}
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in stage.parameters())
    # Layouts are made on the device: what the host sends beside the batch are lengths, not a number for every token.
    assert max(gpu.copies[of_the_batch:]) < 8 * len(batch.tokens_T) / 32


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: x.sum().item(), "meta"),
        (lambda x: bool(x.sum() > 0), "meta"),
        (lambda x: x.tolist(), "meta"),
        (lambda x: x.cpu(), "a copy back"),
        (lambda x: x.to("cpu"), "a copy back"),
        (lambda x: x[x > 0], "meta|nonzero"),
        (lambda x: x + torch.ones(4), "cuda and cpu"),
        (lambda x: torch.ones(4).to("cuda", non_blocking=True), "pageable"),
        (lambda x: torch.ones(4).pin_memory().to("cuda"), "blocks"),
    ],
)
def test_the_pretend_gpu_notices(mistake: Any, message: str) -> None:
    with PretendGPU():
        x = torch.zeros(4, device="cuda")
        assert x.is_cuda
        assert x.device.type == "cuda"
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            mistake(x)
