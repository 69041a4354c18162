"""Stage 1 sees the same loss whichever way the teacher's features come: online, or out of a cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3Model

from data_pipeline import cache_features
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.passes import prepare
from data_pipeline.reading.batch import Batch, Split
from data_pipeline.reading.loader import TrainLoader, heldout_batches
from data_pipeline.text.tokenization import train_tokenizer
from pretrain.config.load import parse_config
from pretrain.stages.vae import VAEStage
from pretrain.stages.vae_config import VAERun
from tests.pretrain import tiny_run

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "house",
    "tree",
    "sees",
    "likes",
    "finds",
    "red",
    "old",
    "small",
    "and",
    "under",
]
SPLIT = Split(kind="truncate", truncate_probability=0.5)
ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared text in `data`, a random causal teacher, and its features in `exact` and `chosen`."""
    folder = tmp_path_factory.mktemp("exactness")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=int(rng.integers(8, 60)))) + "." for _ in range(800)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_tokenizer(texts, 300).save(folder / "tokenizer")
    prepare(
        PrepareOptions(
            source=str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"), output=folder / "data",
            row_tokens=128, max_document_length=64, shards=4, heldout_fraction=0.1,
        )
    )  # fmt: skip
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    Qwen3Model(shape).save_pretrained(folder / "teacher")
    shutil.copytree(folder / "tokenizer", folder / "teacher", dirs_exist_ok=True)
    for name, options in (("exact", ["--exact"]), ("chosen", ["--target-cosine", "0.99", "--sample-tokens", "20000"])):
        paths = ["--data", str(folder / "data"), "--teacher", str(folder / "teacher"), "--output", str(folder / name)]
        assert cache_features.main([*paths, "--device", "cpu", *options]) == 0
    return folder


def stage_of(folder: Path, features: str | None) -> VAEStage:
    """The stage reading a cache, or running the teacher; the same initial weights every time."""
    values = tiny_run.config_values(folder / "data", folder / "run")
    values["repa"] = {"features": str(folder / features)} if features else {"online_teacher": str(folder / "teacher")}
    config = parse_config(values, "test")
    assert isinstance(config, VAERun)
    torch.manual_seed(0)
    stage = VAEStage(config, Manifest.load(folder / "data"), torch.device("cpu"))
    with torch.no_grad():
        for p in stage.parameters():
            if not p.any():  # zeros would hide errors behind them
                p.normal_(std=0.05)
    return stage


def batches_of(folder: Path, stage: VAEStage, num_steps: int) -> list[Batch]:
    """Global batches of the first steps, with the features that the stage reads."""
    loader = TrainLoader(
        folder / "data", stage.config.features_folder(), seed=0, streams=4, rows_per_step=ROWS, micro_batch_rows=ROWS,
        split=SPLIT, workers=0,
    )  # fmt: skip
    with loader:
        return [loader.next_step()[0] for _ in range(num_steps)]


def test_exact_cache_and_online_teacher_give_the_same_loss_and_gradients(folder):
    cached, online = stage_of(folder, "exact"), stage_of(folder, None)
    pairs = list(zip(batches_of(folder, cached, 3), batches_of(folder, online, 3), strict=True))
    for with_features, without in pairs:
        assert with_features.features is not None
        assert without.features is None
        assert torch.equal(with_features.tokens_T, without.tokens_T)
        counts = cached.token_counts(with_features)
        assert 0 < counts["aligned"] < counts["tokens"]  # some windows are cut
        found, expected = cached(with_features, counts), online(without, counts)
        assert abs(found.loss.item() - expected.loss.item()) <= 1e-6
        assert found.metrics["repa_cosine"][0].item() != 0
        found.loss.backward()
        expected.loss.backward()
    for (name, one), other in zip(cached.named_parameters(), online.parameters(), strict=True):
        assert one.grad is not None
        assert (one.grad - other.grad).abs().max() <= 1e-6, name


def test_chosen_codec_keeps_the_repa_loss_within_a_percent(folder):
    """Of a trained VAE: an untrained one's loss is near 0, so that a relative difference says nothing."""
    stage, exact = stage_of(folder, "chosen"), stage_of(folder, "exact")
    optimizer = torch.optim.AdamW(stage.parameters(), lr=1e-2)
    for batch in batches_of(folder, stage, 400):
        stage(batch, stage.token_counts(batch)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    exact.load_state_dict(stage.state_dict())
    losses = {}
    for name, judge in (("chosen", stage.eval()), ("exact", exact.eval())):
        total = torch.zeros(2, dtype=torch.float64)
        data = folder / "data"
        for batch in heldout_batches(data, judge.config.features_folder(), split=SPLIT, seed=0, micro_batch_rows=ROWS):
            with torch.no_grad():
                total += judge(batch, judge.token_counts(batch)).metrics["repa_cosine"].double()
        losses[name] = -float(total[0] / total[1])
    assert losses["exact"] < -0.45
    assert losses["chosen"] != losses["exact"]
    assert abs(losses["chosen"] / losses["exact"] - 1) <= 0.01
