"""The benchmark of evaluation's overhead, in miniature."""

import json

import pytest

from benchmarks import evaluating


def test_its_last_line_holds_the_ratio_and_what_it_is_made_of(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--vocab-size", "300", "--samples", "3", "--tokens", "10", "--steps", "2", "--batch-size", "2"]
    assert evaluating.main(["--dit", "quickstart_dit", "--vae", "quickstart_vae", *sizes]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["overhead_ratio"] > 1
    assert found["overhead_at_50"] > 1
    # Two batches, two steps, and the last step needs no more: contexts with and without in one packed call, or in two.
    assert found["network_calls"] in (4, 8)
    assert found["fixed_s"] > 0
    assert found["evaluation_s"] > 0


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluating.main(["--dit", "quickstart_vae"]) == 2
    assert "expected a configuration of stage dit" in capsys.readouterr().err
    assert evaluating.main(["--steps", "0"]) == 2
