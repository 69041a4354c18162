"""The losses of one hundred steps of every stage are those that tests/golden/ keeps (golden_losses.py writes them)."""

import json
from pathlib import Path

import pytest

from tests.pretrain import golden_losses

TOLERANCE = 1e-4
"""Relative to the largest loss of the curve, where the kernels differ: rounding errors grow over the steps."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return golden_losses.curves(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("stage", golden_losses.STAGES)
def test_every_step_has_the_loss_that_it_had(found: dict[str, list[float]], stage: str) -> None:
    golden = json.loads((golden_losses.FOLDER / f"{stage}.json").read_text())
    assert len(golden["losses"]) == golden["steps"] == golden_losses.STEPS
    if golden["kernels"] == golden_losses.kernels():
        assert found[stage] == golden["losses"]
    else:
        largest = max(map(abs, golden["losses"]))
        assert found[stage] == pytest.approx(golden["losses"], rel=0, abs=TOLERANCE * largest)


def test_a_golden_file_for_every_curve_and_no_other() -> None:
    assert sorted(path.stem for path in Path(golden_losses.FOLDER).glob("*.json")) == sorted(golden_losses.STAGES)
