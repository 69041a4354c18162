"""`textldm plan` and `textldm plan simulate` as they are typed."""

import json
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.plan.__main__ import main
from pretrain.plan.estimate import GIB

TEXT = ["--row-tokens", "512", "--window-tokens", "128", "--tokens", "1e9"]
SMALL = ["--set", "model.width=128", "--set", "model.num_layers=2", "--vocab-size", "2000", *TEXT]


def test_a_plan_in_words_and_as_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "planned.json"
    arguments = ["--config", "dit_b", *SMALL, "--nodes", "2", "--tokens", "1e9", "--price", "2", "--write", str(file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for word in (
        "recommended: train.zero_stage=",
        "tokens/s",
        "days",
        "passes",
        "between failures",
        "GPU hours",
        "shards",
    ):
        assert word in printed
    planned = load_config(file)
    assert planned.model.width == 768  # the base's: what was overridden is not written
    assert planned.train.checkpoint_every > 0
    assert f"data.micro_batch_rows={planned.data.micro_batch_rows}" in printed


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 2000, "width": 128, "num_encoder_layers": 1, "num_decoder_layers": 1}
    overrides = [word for name, size in sizes.items() for word in ("--set", f"model.{name}={size}")]
    assert main(["--config", "vae_base", *overrides, *TEXT, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {choice["zero_stage"] for choice in plan["choices"]} == {1, 2, 3}
    assert plan["cache_bytes"]["exact, 16 bits"] == 1e9 * 4096
    assert plan["best"]["memory"] < 80 * GIB


def test_what_does_not_fit_is_said_with_a_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "dit_b", *SMALL, "--gpu-memory", "0.05", "--write", "nowhere.json"]) == 2
    assert "no choice fits: ZeRO" in (error := capsys.readouterr().err)
    assert "--nodes" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nodes", "0"], "--nodes is 0"),
        (["--gpu", "Abacus"], "name one of A100"),
        (["--tflops", "-3"], "--tflops is -3"),
        (["--mtbf-node-days", "-1"], "--mtbf-node-days is -1"),
        (["--window-tokens", "9999"], "fit into a row"),
    ],
)
def test_mistakes_name_the_option(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "dit_b", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_the_mean_time_between_failures_sets_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two nodes that fail every so many days; by Young's square root where both are long against a save."""
    told = {}
    for days in (1000, 10):
        assert main(["--config", "dit_b", *SMALL, "--nodes", "2", "--mtbf-node-days", str(days), "--json"]) == 0
        told[days] = json.loads(capsys.readouterr().out)
        assert told[days]["hours_between_failures"] == pytest.approx(24 * days / 2)
    assert told[1000]["checkpoint_interval_s"] / told[10]["checkpoint_interval_s"] == pytest.approx(10, rel=0.02)
    assert told[10]["goodput"] < told[1000]["goodput"] < 1


def test_simulate_tells_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "goodput.png"
    arguments = ["simulate", "--nodes", "64", "--spares", "2", "--days", "20", "--plot", str(picture)]
    assert main(arguments) == 0
    assert "wait" in (printed := capsys.readouterr().out)
    assert "shrink" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments[:-2], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["outcomes"]["shrink"]) == 5
    assert main(["simulate", "--nodes", "0"]) == 2
