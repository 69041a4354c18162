"""The small teacher learns, is reproducible, and is a teacher that the feature cache accepts."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_pipeline.core.errors import UserError
from data_pipeline.features.make_teacher import IGNORED, Recipe, Windows, build, main, token_loss
from data_pipeline.features.teacher_fit import check_fit
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare import __main__ as prepare
from data_pipeline.text.tokenization import train_tokenizer
from tests.data_pipeline.sentences import write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "data"
    folder.mkdir()
    write_data(folder)
    return folder


def test_it_learns_and_is_accepted_as_teacher(data, tmp_path, capsys):
    output = tmp_path / "made/teacher"
    arguments = ["--data", str(data), "--output", str(output), "--width", "32", "--layers", "3", "--device", "cpu"]
    assert main([*arguments, "--steps", "80", "--batch-tokens", "512"]) == 0
    nats = float(capsys.readouterr().out.split(" nats per token")[0].split()[-1])
    assert (
        nats < 2.6
    )  # ten words at random cannot be predicted better than ln 10 = 2.3; uniform over the vocabulary is 5.7
    tokens = Manifest.load(data)
    teacher = load_teacher(output)
    check_fit(teacher, str(data), tokens)
    assert (teacher.state.num_layers, teacher.feature_dim, teacher.max_positions) == (1, 32, 48)
    # The saved folder is the model that was judged.
    model = AutoModelForCausalLM.from_pretrained(output).eval()
    held = Windows(str(data), tokens, "heldout")
    with torch.no_grad():
        losses = [(token_loss(model, batch), int((batch[:, 1:] != IGNORED).sum())) for batch in held.batches(999, 0, 0)]
    assert sum(loss * n for loss, n in losses) / sum(n for _, n in losses) == pytest.approx(nats, abs=0.02)
    assert json.loads((output / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert [path.name for path in output.parent.iterdir()] == ["teacher"]
    assert main([*arguments, "--steps", "1"]) == 2
    assert "exists: delete it" in capsys.readouterr().err


def test_batches_hold_every_window_once_within_the_budget(data):
    windows = Windows(str(data), Manifest.load(data), "train")
    expected = sorted(window.tolist() for window in windows.windows)
    for epoch in (0, 1):
        seen = []
        for padded_WL in windows.batches(256, seed=0, epoch=epoch):
            assert padded_WL.numel() <= 256 * 1.2
            seen += [row[row != IGNORED].tolist() for row in padded_WL]
        assert sorted(seen) == expected
    first, second = (next(windows.batches(256, 0, epoch)) for epoch in (0, 1))
    assert first.shape != second.shape or not torch.equal(first, second)


def test_windows_stop_at_the_shard_that_reaches_the_limit_and_keep_the_shards_type(data):
    manifest = Manifest.load(data)
    counts = [shard.tokens for shard in manifest.splits["train"]]
    windows = Windows(str(data), manifest, "train", max_tokens=counts[0] + 1)
    assert windows.num_tokens == counts[0] + counts[1]
    assert {window.dtype for window in windows.windows} == {np.dtype("uint16")}
    assert all(window.base is None for window in windows.windows)  # no view that keeps a shard open


def test_padding_does_not_enter_the_loss(data):
    tokens = Manifest.load(data)
    model = build(tokens, Recipe(width=32, layers=3, steps=1, seconds=None))
    window = torch.randint(tokens.tokenizer.vocab_size, (1, 20))
    padded = torch.nn.functional.pad(window, (0, 13), value=IGNORED)
    torch.testing.assert_close(token_loss(model, padded), token_loss(model, window))


def test_the_learning_rate_follows_the_budget():
    timed, counted = Recipe(seconds=100), Recipe(seconds=None, steps=50)
    assert timed.progress(7, 25.0) == 0.25
    assert counted.progress(10, 1e9) == 0.2
    busy = Recipe(seconds=100, min_steps=50)
    assert (busy.progress(50, 25.0), busy.progress(20, 100.0), busy.progress(50, 100.0)) == (0.25, 0.4, 1)
    rates = [timed.lr_at(share / 100) for share in range(101)]
    assert max(rates) == pytest.approx(timed.lr)
    assert rates.index(max(rates)) == 5
    assert rates[100] == pytest.approx(0.05 * timed.lr)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


@pytest.mark.parametrize(
    "wrong",
    [
        {"width": 100},
        {"layers": 2},
        {"steps": 5},
        {"seconds": -1.0},
        {"min_steps": -1},
        {"seconds": None, "steps": 5, "min_steps": 2},
    ],
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(UserError):
        Recipe(**wrong)


def test_data_without_held_out_rows_is_refused(tmp_path, capsys):
    source = tmp_path / "few.txt"
    source.write_text("a few words that are one document and no more " * 4)
    train_tokenizer([source.read_text()], 300).save(tmp_path / "tokenizer")
    arguments = [
        "--source",
        str(source),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--output",
        str(tmp_path / "data"),
    ]
    assert prepare.main([*arguments, "--row-tokens", "256", "--max-document-length", "64", "--workers", "1"]) == 0
    assert main(["--data", str(tmp_path / "data"), "--output", str(tmp_path / "teacher"), "--steps", "1"]) == 2
    assert "too few documents" in capsys.readouterr().err
    assert not (tmp_path / "teacher").exists()
