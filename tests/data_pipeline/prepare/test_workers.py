"""Worker processes: every task runs once, what this process holds is there, and none outlives it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.prepare.workers import Progress, Workers

Report = Callable[[int, int], None]
held = "what the module holds"


def append(task: Path, report: Report) -> None:
    with task.open("a") as file:
        file.write(f"{os.getpid()} {held}")
    report(1, len(held))


def end_by_signal(task: int, report: Report) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(task: int, report: Report) -> None:
    if task == 3:
        raise UserError("task 3 is wrong")


@pytest.mark.parametrize("number", [1, 3])
def test_every_task_runs_once_with_what_this_process_holds(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "held", "set before")
    with Workers(number) as workers:
        for folder in ("first", "second"):  # both passes
            (tmp_path / folder).mkdir()
            tasks = [tmp_path / folder / str(task) for task in range(20)]
            with Progress(folder, len(tasks), "tasks") as progress:
                workers.run(append, tasks, progress)
    pids, texts = zip(*(path.read_text().split(" ", 1) for path in tmp_path.glob("*/*")), strict=True)
    assert texts == ("set before",) * 40
    assert (str(os.getpid()) in pids) == (number == 1)
    assert len(set(pids)) <= number


def test_an_error_and_a_killed_worker_are_reported() -> None:
    with pytest.raises(UserError, match="task 3 is wrong"), Workers(2) as workers, Progress("", 9, "") as progress:
        workers.run(refuse, range(9), progress)
    with (
        pytest.raises(UserError, match=r"killed.*same command"),
        Workers(2) as workers,
        Progress("", 9, "") as progress,
    ):
        workers.run(end_by_signal, range(9), progress)


SLEEPERS = """
import os, sys, time
from data_pipeline.prepare.workers import Progress, Workers
def sleep(task, report):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(600)
with Workers(3) as workers, Progress("", 3, "") as progress:
    workers.run(sleep, range(3), progress)
"""


def test_no_worker_outlives_a_killed_parent() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(3)]
    assert len(set(pids)) == 3
    parent.kill()
    parent.wait()
    give_up = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < give_up, "a worker is still there"
        time.sleep(0.05)
