"""Faults: who is skipped, who is named, and that a process that hangs ends with its stacks written."""

import errno
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from pretrain.faults import exit_codes, exits
from pretrain.faults.heartbeat import Heartbeat
from pretrain.faults.signals import Signals, ends_at_once
from pretrain.faults.spikes import GuardState, SpikeGuard, TooManySkips
from pretrain.faults.watchdog import Watchdog

ROOT = Path(exits.__file__).parents[2]


def make_guard(sigmas: float = 6.0, max_skips: int = 2, skip_window: int = 10) -> SpikeGuard:
    return SpikeGuard(sigmas, max_skips=max_skips, skip_window=skip_window)


def test_signals_are_noted_once_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    calls = []
    with Signals() as signals:
        signals.on_first = lambda: calls.append(1)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1"
    assert calls == [1]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_hang_up_asks_to_stop_unless_it_is_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == "SIGHUP"
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_raised_norm_that_lasts_is_a_new_level() -> None:
    guard = make_guard(sigmas=20.0, max_skips=5, skip_window=100)
    for step in range(40):
        assert guard.verdict(step, 1.0, 1.0 + 0.001 * (step % 3)) is None
    verdicts = []
    for step in range(40, 200):  # a quarter more, for good
        verdicts.append(guard.verdict(step, 1.0, 1.25 + 0.001 * (step % 3)))
        guard.enforce(step)
        kept = make_guard(sigmas=20.0, max_skips=5, skip_window=100)
        kept.load(guard.state())  # as a resumed run would decide
        guard = kept
    assert all(verdicts[:4])
    assert not any(verdicts[4:])
    assert guard.verdict(200, 1.0, 2.0) is not None  # guarded as before, at the new level


@pytest.mark.parametrize("norms", [(9.0,) * 9, (1.3, 2.0, 3.1, 4.6, 7.0, 10.0), (1.3, math.nan) * 4])
def test_a_norm_that_explodes_or_grows_is_none(norms: tuple[float, ...]) -> None:
    guard = make_guard(sigmas=20.0, max_skips=5, skip_window=100)
    for step in range(40):
        guard.verdict(step, 1.0, 1.0 + 0.001 * (step % 3))
    assert all(guard.verdict(40 + number, 1.0, norm) for number, norm in enumerate(norms))
    with pytest.raises(TooManySkips):
        guard.enforce(60)


def test_many_ranks_write_few_heartbeats(tmp_path: Path) -> None:
    assert Watchdog(1800.0, tmp_path, rank=0, world_size=8)._heartbeat_s == 5.0
    assert 512 / Watchdog(1800.0, tmp_path, rank=0, world_size=512)._heartbeat_s <= 8.0
    assert Watchdog(20.0, tmp_path, rank=0, world_size=512)._heartbeat_s == 5.0  # a quarter of what is waited for


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_non_finite_steps_are_skipped_from_the_first_step_on(loss: float, norm: float) -> None:
    assert make_guard(sigmas=0).verdict(0, loss, norm) is not None


def test_spikes_are_skipped_and_do_not_enter_the_history() -> None:
    guard = make_guard()
    for step in range(40):
        assert guard.verdict(step, 1.0, 1.0 + 0.05 * (step % 3)) is None
    state = guard.state()
    assert "sigmas" in (guard.verdict(40, 1.0, 50.0) or "")
    assert guard.state().norms == state.norms
    assert guard.verdict(41, 1.0, 1.1) is None


def test_a_constant_norm_does_not_make_every_wiggle_a_spike() -> None:
    guard = make_guard()
    for step in range(40):
        guard.verdict(step, 1.0, 1.0)
    assert guard.verdict(40, 1.0, 1.05) is None


def test_no_verdict_on_spikes_without_history_or_without_sigmas() -> None:
    assert make_guard().verdict(0, 1.0, 1e9) is None
    guard = make_guard(sigmas=0.0)
    for step in range(40):
        guard.verdict(step, 1.0, 1.0)
    assert guard.verdict(40, 1.0, 1e9) is None


def test_too_many_skips_stop_the_run_but_old_ones_are_forgotten() -> None:
    guard = make_guard(max_skips=2, skip_window=10)
    for step in (0, 20, 25, 40, 41):
        assert guard.verdict(step, math.nan, 1.0)
        guard.enforce(step)
    guard.verdict(42, math.nan, 1.0)
    with pytest.raises(TooManySkips, match=r"3 steps \(40, 41, 42\) were skipped within 10"):
        guard.enforce(42)


def test_a_restored_guard_decides_as_the_uninterrupted_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeGuard, "WINDOW", 32)  # so that old norms leave it
    norms = [1 + 0.3 * math.sin(step) for step in range(60)]
    norms[30] = norms[50] = 30.0
    straight = make_guard()
    verdicts = [straight.verdict(step, 1.0, norm) for step, norm in enumerate(norms)]
    first, second = make_guard(), make_guard()
    for step in range(35):
        first.verdict(step, 1.0, norms[step])
    second.load(GuardState.model_validate_json(first.state().model_dump_json()))
    assert [second.verdict(step, 1.0, norms[step]) for step in range(35, 60)] == verdicts[35:]
    assert second.state() == straight.state()


def test_the_watchdog_is_quiet_while_there_is_progress(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(3.0, tmp_path, rank=0, exit_process=codes.append) as watchdog:
        for step in range(20):
            watchdog.beat(step, "compute")
            time.sleep(0.2)
    assert codes == []
    assert list((tmp_path / "heartbeats").iterdir()) == []


def hung_process(folder: Path, end_timeout_s: float = 20.0) -> subprocess.CompletedProcess[str]:
    """Rank 3 of a run in `folder`, which hangs in `hang_here`."""
    program = f"""
import threading, time
from pathlib import Path
from pretrain.faults import watchdog
watchdog.END_TIMEOUT_S = {end_timeout_s}
def other_thread_function(): time.sleep(60)
threading.Thread(target=other_thread_function, daemon=True).start()
def hang_here(): time.sleep(60)
with watchdog.Watchdog(1.0, Path({str(folder)!r}), rank=3, host="h") as alive:
    alive.beat(7, "compute")
    hang_here()
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_the_watchdog_ends_a_hung_process_and_writes_all_stacks(tmp_path: Path) -> None:
    done = hung_process(tmp_path)
    assert done.returncode == exit_codes.EXIT_HUNG, done.stderr
    stacks = (tmp_path / "stacks-rank-00003.txt").read_text()
    for text in (stacks, done.stderr):
        assert "hang_here" in text
        assert "other_thread_function" in text
        assert "in phase compute of step 7" in text
        assert "rank 3 on h (step 7, phase compute) is the furthest behind" in text


def test_a_full_disk_does_not_keep_the_watchdog_from_ending_a_hung_process(tmp_path: Path) -> None:
    (tmp_path / "stacks-rank-00003.txt").symlink_to("/dev/full")
    done = hung_process(tmp_path)
    assert done.returncode == exit_codes.EXIT_HUNG, done.stderr
    assert "hang_here" in done.stderr
    assert "the stacks are only here: [Errno 28]" in done.stderr


def test_a_hung_run_folder_does_not_keep_the_watchdog_from_ending_a_hung_process(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    os.mkfifo(tmp_path / "heartbeats" / "rank-00000.json")  # whoever opens it waits for the other end
    done = hung_process(tmp_path, end_timeout_s=1.0)
    assert done.returncode == exit_codes.EXIT_HUNG, done.stderr
    assert "in phase compute of step 7" in done.stderr
    assert "hang_here" in done.stderr


def test_a_heartbeat_that_cannot_be_written_does_not_stop_the_clock(tmp_path: Path) -> None:
    codes: list[int] = []
    written, ended = threading.Event(), threading.Event()
    with Watchdog(1.0, tmp_path, rank=0, exit_process=lambda code: (codes.append(code), ended.set())) as watchdog:
        watchdog._write_heartbeat = written.wait  # type: ignore[method-assign]
        watchdog.end_within(0.0)
        found = ended.wait(30)
        written.set()
    assert found
    assert set(codes) == {exit_codes.EXIT_REQUEUE}


def test_the_grace_period_ends_the_process_for_requeue(tmp_path: Path) -> None:
    codes: list[int] = []
    with Watchdog(2.0, tmp_path, rank=0, exit_process=codes.append) as watchdog:
        watchdog.end_within(0.1)
        for _ in range(40):
            watchdog.beat(0, "checkpoint")
            time.sleep(0.05)
    assert set(codes) == {exit_codes.EXIT_REQUEUE}


def test_the_culprit_is_the_silent_rank_else_the_one_behind(tmp_path: Path) -> None:
    watchdog = Watchdog(40.0, tmp_path, rank=0)
    (tmp_path / "heartbeats").mkdir()

    def beat(rank: int, step: int, phase: str, age_s: float = 0.0) -> None:
        Heartbeat(rank, f"host{rank}", 1, step, phase, 0.0, time.time() - age_s).write(tmp_path)

    for rank in range(4):
        beat(rank, 12, "compute" if rank == 2 else "measure")
    assert watchdog.culprit().startswith("rank 2 on host2")
    beat(1, 12, "measure", age_s=100)
    assert watchdog.culprit().startswith("rank 1 on host1 (step 12, phase measure) is silent for 100 s")


def test_exit_codes_and_messages(capsys: pytest.CaptureFixture[str]) -> None:
    assert exits.exit_code_of(UserError("bad key")) == exit_codes.EXIT_USER
    assert capsys.readouterr().err == "error: bad key\n"
    assert exits.exit_code_of(TooManySkips("x")) == exit_codes.EXIT_SKIPS
    assert exits.exit_code_of(KeyboardInterrupt()) == 130
    capsys.readouterr()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/config.json")
    assert exits.exit_code_of(full) == exit_codes.EXIT_USER
    assert capsys.readouterr().err.startswith("error: No space left on device (runs/x/config.json): make room")
    assert exits.exit_code_of(RuntimeError("boom"), rank=5) == exit_codes.EXIT_FAILED
    assert "rank 5" in capsys.readouterr().err
    assert exits.exit_code_of(torch.OutOfMemoryError("no memory")) == exit_codes.EXIT_FAILED
    assert "Lower data.micro_batch_rows" in capsys.readouterr().err


def test_ctrl_c_is_noted_while_at_work_and_counts_once_for_one_press(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    second = []
    with Signals() as signals:
        signals.on_second = lambda: second.append(1)
        with pytest.raises(KeyboardInterrupt):  # nothing to save yet
            signal.raise_signal(signal.SIGINT)
        signals.at_work = True
        signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGINT"
        now += 0.5
        signal.raise_signal(signal.SIGINT)  # the launcher's copy of the same press
        signal.raise_signal(signal.SIGTERM)  # what deepspeed's launcher makes of it
        assert (signals.received, second) == ("SIGINT", [])
        now += 2
        signal.raise_signal(signal.SIGINT)
        assert second == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_stays_ignored_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell starts jobs in the background so."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ends_at_once(), Signals() as signals:
            signals.at_work = True
            signal.raise_signal(signal.SIGINT)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "command", [["-m", "pretrain", "train", "--config", "dit_b"], ["pretrain/train.py", "--config", "dit_b"]]
)
def test_ctrl_c_during_imports_ends_without_a_traceback(command: list[str], tmp_path: Path) -> None:
    """A stand-in for torch is imported for as long as it takes; by a rank of two, which do not look for their data before."""
    (tmp_path / "torch.py").write_text("import os, time\nprint('importing', flush=True)\ntime.sleep(100)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONUNBUFFERED": "1", "WORLD_SIZE": "2"}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT  # of which shells say 130
        assert process.stderr.read() == ""


@pytest.mark.parametrize("command", [["-m", "pretrain", "train"], ["pretrain/train.py"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "dit_x"], "no configuration dit_x"),
        (["--config", "dit_b", "--set", "train.step=5"], "the nearest known key is train.steps"),
        (["--config", "dit_b", "--frehs"], "unrecognized arguments: --frehs"),
    ],
)
def test_a_mistake_is_said_before_torch_is_imported(
    command: list[str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (exit_codes.EXIT_USER, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
