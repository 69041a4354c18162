"""A scheduler starts again what the table says, and a failure without progress only so often."""

from pathlib import Path

import pytest

from pretrain.faults.exit_codes import MAX_FAILURES
from pretrain.jobs import requeue
from pretrain.jobs.requeue import ledger, main, start_again


@pytest.mark.parametrize(("code", "again"), [(0, False), (2, False), (87, False), (130, False), (85, True)])
def test_what_is_certain_is_not_counted(code: int, again: bool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert all(start_again(run, code)[0] is again for _ in range(3 * MAX_FAILURES))
    assert not ledger(run).exists()


@pytest.mark.parametrize("code", [1, 86, 88, 134, 135, 137, 139])
def test_failures_without_a_new_checkpoint_are_bounded(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = {10: "a"}
    monkeypatch.setattr(requeue, "complete_steps", lambda run: checkpoints)
    run = tmp_path / "run"
    answers = [start_again(run, code)[0] for _ in range(MAX_FAILURES + 1)]
    assert answers == [True] * MAX_FAILURES + [False]
    checkpoints[20] = "b"  # progress
    assert start_again(run, code)[0]
    assert start_again(run, 85)[0]  # asked for: what failed before is forgotten
    assert not ledger(run).exists()


def test_a_ledger_that_is_no_ledger_counts_from_the_beginning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for text in ("", "[]", '{"checkpoints": 3, "failures": "x"}'):
        ledger(run).write_text(text)
        assert start_again(run, 1)[0]


def test_the_command_reads_the_runs_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "dit_xl", "--run", str(tmp_path / "run"), "--set", "train.steps=9000"]
    assert main(["85", *arguments]) == 0
    assert main(["86", *arguments]) == 0
    assert "started again: exit code 86" in capsys.readouterr().err
    assert ledger(tmp_path / "run").exists()
    assert main(["87", *arguments]) == 1
    assert main(["2", "--config", "no_such"]) == 1
