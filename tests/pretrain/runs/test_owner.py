"""A run folder has one owner: who comes second is told by whom it is held, a dead owner's folder is taken over, by one job."""

import errno
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.runs import owner
from pretrain.runs.folder import begun_anew, put_aside, remove_unstarted
from pretrain.runs.owner import OWNER, Owner, Ownership


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.05)
    monkeypatch.setattr(owner, "DEAD_S", 1.0)
    monkeypatch.setattr(owner, "SETTLE_S", 0.2)
    for name in (
        "SLURM_JOB_ID",
        "TEXTLDM_JOB",
        "TORCHELASTIC_RUN_ID",
        "SLURM_RESTART_COUNT",
        "TORCHELASTIC_RESTART_COUNT",
    ):
        monkeypatch.delenv(name, raising=False)


def found(run: Path) -> Owner | None:
    return Owner.parse((run / OWNER).read_text())


def leave_behind(run: Path, **fields: object) -> Owner:
    """An owner's file, as of a process that does not write it any more."""
    run.mkdir(exist_ok=True)
    left = replace(Owner.here(), **fields)
    (run / OWNER).write_text(json.dumps(asdict(left)))
    return left


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_second_job_is_told_by_whom_the_folder_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    run = tmp_path / "deep" / "run"
    first, lines = Ownership(run), []
    with pytest.raises(
        UserError, match=rf"{run} is in use by process {os.getpid()} on \S+ \(Slurm job 4711\).*--run"
    ) as raised:
        Ownership(run, say=lines.append)
    assert "\n" not in str(raised.value)
    assert len(lines) == 1
    with pytest.raises(UserError, match="is in use by"):
        put_aside(run)
    assert run.is_dir()
    first.release()
    assert not run.exists()  # nothing came into it
    second = Ownership(run)
    (run / "config.json").touch()
    second.release()
    assert [path.name for path in run.iterdir()] == ["config.json"]


@pytest.mark.parametrize("how", ["ended", "unreaped", "its id is another process's"])
def test_an_owner_that_has_ended_on_this_machine_is_replaced_at_once(tmp_path: Path, how: str) -> None:
    process = subprocess.Popen(["true"]) if how == "unreaped" else None
    while process and owner._started(process.pid) != -1:
        time.sleep(0.01)
    pid = process.pid if process else ended_process() if how == "ended" else os.getppid()
    leave_behind(tmp_path / "run", pid=pid, started=1)
    lines: list[str] = []
    hold = Ownership(tmp_path / "run", say=lines.append)
    assert lines == []
    assert (held := found(tmp_path / "run")) is not None
    assert held.pid == os.getpid()
    hold.release()
    if process:
        process.wait()


@pytest.mark.parametrize("machine", ["another boot", ""])
def test_an_owner_elsewhere_is_dead_when_its_heartbeat_stands_still(tmp_path: Path, machine: str) -> None:
    leave_behind(tmp_path / "run", machine=machine, pid=ended_process(), time=time.time() + 3600)  # clocks differ
    lines: list[str] = []
    began = time.monotonic()
    hold = Ownership(tmp_path / "run", say=lines.append)
    assert time.monotonic() >= began + 1.0
    assert "waiting for its heartbeat" in lines[0]
    hold.release()


def test_an_owner_elsewhere_is_alive_while_its_heart_beats(tmp_path: Path) -> None:
    left = leave_behind(tmp_path / "run", machine="another boot", host="node7", time=0.0)
    beats = threading.Timer(0.3, lambda: leave_behind(tmp_path / "run", **asdict(replace(left, beat=1))))
    beats.start()
    with pytest.raises(UserError, match="on node7"):
        Ownership(tmp_path / "run")
    beats.join()
    assert found(tmp_path / "run") == replace(left, beat=1)


def test_the_copy_of_a_run_in_use_is_free(tmp_path: Path) -> None:
    first = Ownership(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    Ownership(tmp_path / "copy").release()
    first.release()


def test_a_torn_file_belongs_to_nobody_once_it_has_been_watched(tmp_path: Path) -> None:
    (tmp_path / OWNER).write_text("")
    hold = Ownership(tmp_path)
    assert found(tmp_path) is not None
    hold.release()


@pytest.mark.parametrize("left", [False, True])
def test_of_jobs_that_come_at_once_one_has_the_folder(tmp_path: Path, left: bool) -> None:
    if left:
        leave_behind(tmp_path / "run", pid=ended_process())
    holds, refusals, gate = [], [], threading.Barrier(4)

    def come() -> None:
        gate.wait()
        try:
            holds.append(Ownership(tmp_path / "run"))
        except UserError as error:
            refusals.append(str(error))

    jobs = [threading.Thread(target=come) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert (len(holds), len(refusals)) == (1, 3), refusals
    holds[0].release()


def test_who_was_taken_over_ends_and_leaves_the_new_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    said, lost = [], threading.Event()
    hold = Ownership(tmp_path / "run", lost=lambda why: (said.append(why), lost.set()))
    new = leave_behind(tmp_path / "run", host="node8")
    while not lost.wait(0.2):  # a heartbeat may have been on its way
        new = leave_behind(tmp_path / "run", host="node8")
    assert "node8" in said[0]
    hold.release()
    assert found(tmp_path / "run") == new


def test_a_folder_that_is_none_or_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for run in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=rf"the run folder {run} cannot be written \([^\n]*--run$"):
            Ownership(run)
    assert (tmp_path / "file").is_file()
    for function in ("_write", "_read"):
        (tmp_path / function).mkdir()
        (tmp_path / function / OWNER).write_text("") if function == "_read" else None
        with monkeypatch.context() as patch:
            patch.setattr(Ownership, function, lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
            with pytest.raises(UserError, match="No space left"):
                Ownership(tmp_path / function)
    assert not (tmp_path / "_write" / OWNER).exists()  # an empty one would be another job's to the next start


def test_a_requeued_job_that_died_before_it_began_anew_does_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told from one that did by the job's name in the folder."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").touch()  # of an older job
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    put_aside(run)
    assert not run.exists()
    begun_anew(run)
    (run / "config.json").touch()
    put_aside(run)
    assert (run / "config.json").exists()
    assert [path.name for path in tmp_path.glob("run.*")] == ["run.1"]


def test_a_start_that_fails_leaves_no_folder_of_its_own_making(tmp_path: Path) -> None:
    def start(run: Path, written: str) -> None:
        remove = remove_unstarted(run)
        hold = Ownership(run)
        (run / "heartbeats").mkdir(exist_ok=True)
        (run / written).touch()
        remove()
        hold.release()

    start(tmp_path / "failed", "latents.npz")
    assert not (tmp_path / "failed").exists()
    for _ in range(2):  # the second start finds a folder
        start(tmp_path / "began", "config.json")
    start(tmp_path / "began", "more")
    assert sorted(path.name for path in (tmp_path / "began").iterdir()) == ["config.json", "heartbeats", "more"]


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_fresh_means_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    run = tmp_path / "run"
    for count, aside in (("0", ["run.1"]), ("1", ["run.1"]), ("12", ["run.1"]), ("", ["run.1", "run.2"])):
        run.mkdir(exist_ok=True)
        (run / "config.json").touch()
        monkeypatch.setenv(variable, count)
        put_aside(run)
        assert sorted(path.name for path in tmp_path.glob("run.*")) == aside
        assert run.exists() == (count not in ("0", ""))
