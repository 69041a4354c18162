"""The benchmarks of prepare and of the feature cache run, and say what the documents quote; on a text of a few seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import features, measuring
from benchmarks import prepare as prepare_benchmark
from benchmarks.online_teacher import TEACHER_LAYERS, teacher_flops
from data_pipeline.features.make_teacher import Recipe, make_teacher
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.passes import prepare
from data_pipeline.text.tokenization import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text.jsonl` of a grammar of a dozen words, its tokenizer, `data` prepared as the quickstart's, and a teacher."""
    folder = tmp_path_factory.mktemp("benchmarks")
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "bird", "sees", "likes", "finds", "red", "old", "tree", "and", "house"]
    texts = [" ".join(rng.choice(words, size=int(rng.integers(20, 200)))) + "." for _ in range(600)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    train_tokenizer(texts, 280).save(folder / "tokenizer")
    prepare(
        PrepareOptions(
            source=str(folder / "text.jsonl"), tokenizer=str(folder / "tokenizer"), output=folder / "data",
            row_tokens=512, max_document_length=256, shards=4, heldout_fraction=0.1,
        )
    )  # fmt: skip
    recipe = Recipe(width=32, layers=3, seconds=None, steps=2)
    make_teacher(str(folder / "data"), folder / "teacher", recipe, torch.device("cpu"))
    return folder


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    """The JSON object that ends the output, with what every benchmark says of its surroundings."""
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"processor", "cores"} <= figures["machine"].keys()
    assert figures["versions"]["torch"] == torch.__version__
    assert {"commit", "date"} <= figures.keys()
    return figures


def test_prepare(folder, capsys, monkeypatch):
    for name in ("RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # which the benchmark sets for its process
    text = folder / "text.jsonl"
    arguments = ["--text", str(text), "--fill", f"{text}:512", f"{text}:1024", "--tokenizer", str(folder / "tokenizer")]
    assert prepare_benchmark.main([*arguments, "--workers", "1", "--repetitions", "1"]) == 0
    figures = last_line(capsys)
    assert figures["prepare_over_encode_loaded"] > figures["prepare_over_encode"] > 0
    assert set(figures["row_fills"]) == {"text at 512", "text at 1024"}
    assert 0.9 < figures["row_fill"] == min(figures["row_fills"].values()) <= 1
    assert figures["documents"] == 600


def test_features(folder, capsys):
    teacher = ["--corpus-teacher", str(folder / "teacher"), "--teacher", str(folder / "teacher")]
    sizes = ["--sample-tokens", "6000", "--steps", "3", "--repetitions", "1", "--scale", "32", "--device", "cpu"]
    assert (
        features.main(["--corpus", str(folder / "text.jsonl"), "--data", str(folder / "data"), *teacher, *sizes]) == 0
    )
    figures = last_line(capsys)
    found = figures["teachers"]
    assert set(found) == {"teacher on text", "teacher on data"}
    assert 0 < figures["feature_bytes_ratio"] == max(one["bf16_ratio"] for one in found.values()) < 1
    assert figures["mean_cosine"] > 0.97
    for one in found.values():
        assert {(row["rank"], row["bits"]) for row in one["table"]} >= {(8, "4"), (16, "8"), (32, "16")}
    assert figures["exact_minus_online"] <= 1e-6
    assert figures["repa_loss_relative_difference"] >= 0
    assert figures["online_over_cached"] > 0
    assert 2 < figures["online_over_cached_by_flops"] < 4


def test_scaling_keeps_the_ratio_of_flops():
    """Every width and length divided by s: a token's FLOPs fall by s^2, a window has a s-th of the tokens."""
    full = teacher_flops(1, [1024, 512])
    assert teacher_flops(4, [256, 128]) == pytest.approx(full / 4**3)
    assert TEACHER_LAYERS == 28
    # 26 layers of Qwen3-1.7B: 2 FLOPs a weight and token, and half of attention's squares.
    weights = 26 * (2048 * 128 * (2 * 16 + 2 * 8) + 3 * 2048 * 6144)
    assert teacher_flops(1, [1024]) == pytest.approx(2 * weights * 1024 + 26 * 2 * 2048 * 1024**2)


def test_missing_text_is_said_in_one_line(tmp_path, capsys):
    assert prepare_benchmark.main(["--text", str(tmp_path / "none.jsonl")]) == 2
    assert "name another with --text" in capsys.readouterr().err
    assert features.main(["--corpus", str(tmp_path / "none.jsonl")]) == 2
    assert "name another with --corpus" in capsys.readouterr().err


def test_repetitions_take_turns():
    order: list[str] = []
    spent = measuring.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "turns")
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert spent.keys() == {"a", "b"}
