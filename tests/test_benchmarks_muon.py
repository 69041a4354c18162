"""The benchmark of Muon trains what it says and compares last figures; on random data, two steps."""

import json
from pathlib import Path

import pytest

from benchmarks import muon
from tests.pretrain import tiny_pipeline


def test_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, dit = tiny_pipeline.train_both(tmp_path)
    values = json.loads((dit / "config.json").read_text())
    values["optimizer"] |= {"kind": "muon", "matrix_lr": 0.01}
    (dit / "config.json").write_text(json.dumps(values))
    assert muon.main(["--run", str(dit), "--steps", "4", "--shares", "0.5", "1"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 4
    assert figures["figure"] == "eval/nats"
    assert set(figures["muon"]) == {"0.5", "1"}
    assert figures["adamw"] > 0
    assert figures["seconds_ratio"] > 0
    assert "steps_ratio" in figures


def test_the_ratio_lies_between_the_shares_that_enclose_the_target() -> None:
    by_share = {1.0: 3.0, 0.25: 5.0, 0.5: 4.0}
    assert muon.steps_ratio(4.0, by_share) == pytest.approx(0.5)
    assert muon.steps_ratio(3.5, by_share) == pytest.approx(0.5**0.5)
    assert muon.steps_ratio(6.0, by_share) == 0.25
    assert muon.steps_ratio(2.9, by_share) is None
