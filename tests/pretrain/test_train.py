"""The loop, with a stage in miniature: resuming is exact, faults are agreed on, mistakes refused."""

import contextlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain import train
from pretrain.checkpoint import write as checkpoint_writer
from pretrain.checkpoint.find import checkpoint_at, saved_steps
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.engine.engine import Engine
from pretrain.faults.exit_codes import EXIT_FAILED, EXIT_HUNG, EXIT_INTERRUPTED, EXIT_REQUEUE, EXIT_SKIPS, EXIT_USER
from pretrain.faults.signals import SAME_PRESS_S
from pretrain.faults.watchdog import Watchdog
from pretrain.runs.owner import Ownership
from pretrain.runs.resume import refuse_other_inputs
from pretrain.session import Session
from pretrain.telemetry.record import STRAGGLER
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import forked_ranks, tiny_run
from tests.pretrain.engine_states import saved_states


@pytest.fixture(autouse=True)
def tiny_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.session.build_stage", lambda config, manifest, device: tiny_run.TinyStage())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_data(tmp_path_factory.mktemp("tiny"))


def start(config: Path, *arguments: str) -> int:
    """One process, here."""
    return train.main(["--config", str(config), *arguments])


def start_ranks(config: Path, *arguments: str, **environment: str) -> list[BaseProcess]:
    """The same command on two ranks, as a launcher starts it, but without one that ends them."""
    return forked_ranks.start(config, *arguments, module="tests.pretrain.tiny_run", **environment)


def output_of(config: Path) -> str:
    """What the ranks wrote."""
    return config.with_suffix(".log").read_text()


def losses(run: Path) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in read_metrics(run)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in found if not torch.equal(found[name], expected[name])]
    assert not different


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    config = tiny_run.write_config(folder / "c.json", tiny_run.config_values(data, folder / "run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.session.build_stage", lambda config, manifest, device: tiny_run.TinyStage())
        assert start(config) == 0
    return folder / "run"


def save_at_once(patch: pytest.MonkeyPatch) -> None:
    """Saves are over when the loop goes on: what is complete at a step does not depend on the disk."""
    save = Session.save

    def save_and_wait(session: Session, blocking: bool = False) -> None:
        save(session, blocking)
        session.writer.settle()

    patch.setattr(Session, "save", save_and_wait)


def make_config(tmp_path: Path, data: Path, **train_keys: object) -> Path:
    return tiny_run.write_config(tmp_path / "c.json", tiny_run.config_values(data, tmp_path / "run", **train_keys))


def test_the_loop_fits_one_screen_and_knows_no_stage() -> None:
    assert len(inspect.getsource(train.train).splitlines()) <= 52
    source = inspect.getsource(train)
    assert "vae" not in source.lower().replace("vae_base", "")


def test_a_run_leaves_what_it_promises(straight: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, evaluations = read_metrics(straight), read_metrics(straight, "eval")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in evaluations] == [3, 6]
    assert lines[0]["loss"] > lines[-1]["loss"]
    assert lines[0]["ce"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    kept = {path.name for path in (straight / "checkpoints").iterdir()}
    assert kept == {"latest", "step-000000004", "step-000000006"}
    assert start(straight / "config.json") == 0  # the resolved configuration is one, and the run is finished
    assert "is finished" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(straight)] == [1, 2, 3, 4, 5, 6]


def test_the_evaluation_uses_the_ema(straight: Path, data: Path) -> None:
    from data_pipeline.reading.batch import Split
    from data_pipeline.reading.loader import heldout_batches

    stage = tiny_run.TinyStage()
    stage.load_state_dict(read_tensors(straight, state="ema"))
    sums = torch.zeros(2)
    for batch in heldout_batches(data, None, split=Split(kind="none"), seed=0, micro_batch_rows=2, max_rows=6):
        sums += stage(batch, {"tokens": 1}).metrics["ce"].detach()
    assert read_metrics(straight, "eval")[-1]["eval/ce"] == pytest.approx((sums[0] / sums[1]).item(), rel=1e-6)


@pytest.mark.parametrize("ticket", [0, 24, 31])
def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(
    ticket: int, tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path, data)
    monkeypatch.setenv("TINY_TERM", f"0:{ticket}")
    assert start(config) == EXIT_REQUEUE
    assert read_manifest(checkpoint_at(tmp_path / "run", ticket // 8 + 1)).step == ticket // 8 + 1
    monkeypatch.delenv("TINY_TERM")
    assert start(config) == 0
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))
    assert losses(tmp_path / "run") == losses(straight)


def interrupted_in(step: int, times: int = 1) -> Callable[[Watchdog, int, str], None]:
    """`Watchdog.beat`, and Ctrl-C while this step is computed."""
    beat = Watchdog.beat

    def beat_and_interrupt(watchdog: Watchdog, now: int, phase: str) -> None:
        beat(watchdog, now, phase)
        if (now, phase) == (step, "compute"):
            for number in range(times):
                time.sleep(SAME_PRESS_S * 1.1 * min(number, 1))
                signal.raise_signal(signal.SIGINT)

    return beat_and_interrupt


def test_ctrl_c_saves_and_says_so_and_the_same_command_goes_on_bit_for_bit(
    tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, data)
    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "beat", interrupted_in(2))
        assert start(config) == EXIT_INTERRUPTED == 130
    assert saved_steps(tmp_path / "run")[0] == 3
    said = capfd.readouterr()
    assert "Ctrl-C: a checkpoint after this step, then the end; once more ends at once" in said.err
    assert f"checkpoint of step 3 is in {tmp_path / 'run'}; the same command goes on from there" in said.out
    assert start(config) == 0
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_saved(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    left = []
    monkeypatch.setattr(Watchdog, "beat", interrupted_in(2, times=2))
    monkeypatch.setattr("pretrain.session.leave", left.append)
    save_at_once(monkeypatch)
    start(make_config(tmp_path, data))
    assert left == [EXIT_INTERRUPTED]
    assert "Ctrl-C, twice: ended at once; the newest checkpoint is that of step 2" in capfd.readouterr().err


def test_an_evaluation_that_fails_costs_no_steps(
    tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = make_config(tmp_path, data, eval_every=2)
    save_at_once(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", out_of_memory)
        assert start(config) == EXIT_FAILED
    assert saved_steps(tmp_path / "run") == [2]
    assert start(config) == 0
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.parametrize("ticket", [8, 16])
def test_sigterm_after_a_failed_save_saves_all_the_same(
    ticket: int, tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    config = make_config(tmp_path, data)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_slices", tiny_run.full_disk_once(checkpoint_writer.write_slices))
        patch.setenv("TINY_TERM", f"0:{ticket}")
        assert start(config) == EXIT_REQUEUE
    assert "the checkpoint after step 2 could not be written: [Errno 28]" in capsys.readouterr().err
    assert saved_steps(tmp_path / "run") == [ticket // 8 + 1]
    assert start(config) == 0
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))


def test_a_disk_that_is_full_for_a_while_costs_lines_and_saves_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fill(watchdog: Watchdog, step: int, phase: str) -> None:
        full = 1 <= step < 5 and phase != "end"
        monkeypatch.setattr(checkpoint_writer, "write_slices", tiny_run.full_disk if full else write_slices)

    write_slices = checkpoint_writer.write_slices
    monkeypatch.setattr(Watchdog, "beat", fill)
    (tmp_path / "run").mkdir()
    for name in ("log.txt", "skipped.jsonl"):
        (tmp_path / "run" / name).symlink_to("/dev/full")
    monkeypatch.setenv("TINY_NAN", "9")
    assert start(make_config(tmp_path, data, checkpoint_every=1)) == 0
    error = capsys.readouterr().err
    assert "the one before it stands\n" in error
    assert "log.txt: No space left on device; lines are lost" in error
    assert "skipped.jsonl: No space left on device; lines are lost" in error
    assert saved_steps(tmp_path / "run")[0] == 6
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_launcher_that_is_killed_while_its_rank_imports_is_missed(tmp_path: Path, data: Path) -> None:
    config, log = make_config(tmp_path, data), tmp_path / "rank.log"
    rank = [sys.executable, "-u", "pretrain/train.py", "--config", str(config)]
    script = (
        f"import subprocess, sys, time; print(subprocess.Popen({rank}, stdout=open({str(log)!r}, 'w'), stderr=-2).pid)"
    )
    command = [sys.executable, "-u", "-c", f"{script}; time.sleep(600)", "deepspeed.launcher.launch"]
    with subprocess.Popen(command, cwd=Path(train.__file__).parents[1], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        process = psutil.Process(int(launcher.stdout.readline()))
        try:
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.is_running(), log.read_text()
                time.sleep(0.002)
            launcher.kill()
            process.wait(300)
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            launcher.kill()
    assert "the launcher's end: writing a checkpoint after step 0" in log.read_text()


@pytest.mark.parametrize("phase", Watchdog.PHASES[:-1])
def test_sigterm_in_any_phase_saves_and_the_same_command_goes_on_bit_for_bit(
    phase: str, tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat = Watchdog.beat

    def beat_and_signal(watchdog: Watchdog, step: int, now: str) -> None:
        beat(watchdog, step, now)
        if now == phase and step >= 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def engine_and_signal(*arguments: object) -> Engine:
        os.kill(os.getpid(), signal.SIGTERM)
        return Engine(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        if phase == "setup":
            patch.setattr("pretrain.session.Engine", engine_and_signal)
        else:
            patch.setattr(Watchdog, "beat", beat_and_signal)
        assert start(make_config(tmp_path, data)) == EXIT_REQUEUE
    saved = saved_steps(tmp_path / "run")
    assert saved[0] < 6
    assert start(tmp_path / "c.json") == 0
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))
    assert losses(tmp_path / "run") == losses(straight)


def test_a_bad_step_is_skipped_and_written_down(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_NAN", "18")
    assert start(make_config(tmp_path, data, eval_every=0)) == 0
    (entry,) = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert (entry["step"], entry["reason"], entry["rank"]) == (2, "the loss is nan", 0)
    assert [row[0] for row in entry["rows"]] == list(range(16, 24))
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert all(torch.isfinite(tensor).all() for tensor in saved_states(tmp_path / "run").values())


def test_too_many_bad_steps_stop_the_run(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TINY_NAN", "18,26,34")
    assert start(make_config(tmp_path, data, max_skips=2)) == EXIT_SKIPS
    assert "3 steps (2, 3, 4) were skipped" in capsys.readouterr().err
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 3


def test_rewinding_leaves_out_the_rows_from_the_last_good_checkpoint_on(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_NAN", "26,34")  # steps 3 and 4; the newest checkpoint before them is that after step 1
    config = make_config(tmp_path, data, max_skips=1, rewind=True, checkpoint_every=2, keep_last=9)
    save_at_once(monkeypatch)
    assert start(config) == 0
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (rewind,) = [event for event in events if event.get("event") == "rewind"]
    assert (rewind["checkpoint"], rewind["left_out"], rewind["step"]) == ("step-000000002", [2, 4], 5)
    before, after = (read_manifest(checkpoint_at(tmp_path / "run", step)).extra for step in (2, 5))
    assert after["telemetry"] == before["telemetry"]  # step 2 is lost, and counts against the goodput


def test_the_first_step_is_said_at_once_and_the_end_names_checkpoint_and_next_command(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(make_config(tmp_path, data, log_every=5, eval_every=0)) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    assert re.search(r"step 1: loss [\d.]+, gradient norm [\d.e-]+, [\d.]+ s", out)
    assert f"finished; checkpoint {run}/checkpoints/step-000000006; next: textldm diagnose --run {run}" in out
    assert [line["step"] for line in read_metrics(run)] == [5, 6]


def test_a_dry_run_leaves_nothing(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, data)
    assert start(config, "--dry-run") == 0
    assert "one step" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]
    (tmp_path / "run.dry-run").mkdir()
    (tmp_path / "run.dry-run" / "notes.txt").touch()
    assert start(config, "--dry-run") == EXIT_USER
    assert "run.dry-run" in capsys.readouterr().err
    assert (tmp_path / "run.dry-run" / "notes.txt").exists()
    (tmp_path / "run.dry-run" / "notes.txt").unlink()
    (tmp_path / "run.dry-run").rmdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("s4:bucket")  # where a start would look
    assert start(config, "--dry-run") == EXIT_USER
    assert "'s4' is none of the known checkpoint_storages" in capsys.readouterr().err


def test_data_without_held_out_rows_is_refused_unless_nothing_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    fields = json.loads((data / "manifest.json").read_text())
    fields["splits"]["heldout"] = []
    del fields["fingerprint"], fields["format_version"]
    (data / "manifest.json").write_text(Manifest.create(**fields).model_dump_json())
    config = make_config(tmp_path, data)
    assert start(config, "--dry-run") == EXIT_USER
    error = capsys.readouterr().err
    assert "train.eval_every=0" in error
    assert "--heldout-fraction" in error
    assert start(config, "--set", "train.eval_every=0") == 0


def test_a_changed_run_is_refused_with_both_values(
    tmp_path: Path, data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(straight / "config.json")
    for override, expected in (
        ("train.seed=5", "train.seed was 0, is 5"),
        ("data.rows_per_step=16", "data.rows_per_step was 8, is 16"),
        ("data.streams=2", "data.streams was 4, is 2"),
        ("optimizer.lr=0.5", "add --allow-change optimizer.lr"),
    ):
        assert train.main(["--config", config, "--set", override]) == EXIT_USER
        assert expected in capsys.readouterr().err
    other = tiny_run.write_data(tmp_path / "other", seed=1)
    assert train.main(["--config", config, "--set", f"data.path={other}"]) == EXIT_USER
    assert "fingerprint was" in capsys.readouterr().err


def test_another_vae_by_the_same_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"what model.vae names had fingerprint a and has b"):
        refuse_other_inputs({"model.vae": "a"}, {"model.vae": "b"}, [], "runs/x")
    refuse_other_inputs({"model.vae": "a"}, {"model.vae": "b"}, ["model.vae"], "runs/x")
    refuse_other_inputs({"model.vae": "a"}, {"model.vae": "a"}, [], "runs/x")


def test_allowed_and_harmless_changes_proceed(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, data)
    assert start(config, "--set", "train.steps=2") == 0
    changes = ["--set", "optimizer.lr=0.5", "--set", "train.zero_stage=2", "--allow-change", "optimizer.lr"]
    assert start(config, *changes, "--allow-change", "train.steps") == 0
    out = capsys.readouterr().out
    assert "optimizer.lr was 0.01, is 0.5" in out
    assert "train.zero_stage was 1, is 2" in out


def test_a_micro_batch_that_does_not_divide_a_ranks_rows_is_made_smaller(
    tmp_path: Path, data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(make_config(tmp_path, data), "--set", "data.micro_batch_rows=3") == 0
    out = capsys.readouterr().out
    assert "4 micro-batch(es) of 2 x" in out
    assert "(data.micro_batch_rows is 3; a rank has 8 rows)" in out
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))


def test_fresh_puts_the_old_run_aside(tmp_path: Path, data: Path) -> None:
    config = make_config(tmp_path, data, steps=2)
    assert start(config) == 0
    assert start(config, "--fresh", "--set", "train.seed=1") == 0
    assert (tmp_path / "run.1" / "checkpoints" / "latest").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["seed"] == 1
    assert start(config, "--fresh", "--set", "data.path=nowhere") == EXIT_USER
    assert (tmp_path / "run").exists()  # a mistake puts nothing aside


def test_a_start_that_fails_leaves_no_folder(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("the VAE has another width")

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.session.build", fail)
        assert start(make_config(tmp_path, data)) == EXIT_USER
    assert "another width" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_run_in_use_is_left_alone(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr("pretrain.runs.owner.BEAT_S", 0.05)
    hold = Ownership(tmp_path / "run")
    assert start(make_config(tmp_path, data), *flags) == EXIT_USER
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["owner.json"]
    hold.release()


def test_a_requeued_job_does_not_start_over_again(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(tmp_path, data)
    assert start(config, "--set", "train.steps=2", "--allow-change", "train.steps") == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(config, "--fresh", "--allow-change", "train.steps") == 0
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run.1").exists()


def test_damaged_checkpoints_are_passed_over_but_never_forgotten(
    tmp_path: Path, data: Path, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, data)
    assert start(config) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    file = next((checkpoints / "step-000000006").glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert start(config) == 0
    assert "step-000000006" in capsys.readouterr().err
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))
    assert {path.name for path in checkpoints.iterdir()} == {
        "latest", "step-000000004", "step-000000006", "step-000000006.damaged-1",
    }  # fmt: skip
    for file in checkpoints.glob("step-*/rank-*"):
        file.write_bytes(b"x")
    assert start(config) == EXIT_USER
    assert "none of them is complete" in capsys.readouterr().err


def test_profiling_leaves_a_trace(tmp_path: Path, data: Path) -> None:
    assert start(make_config(tmp_path, data, eval_every=0), "--profile", "2") == 0
    assert list((tmp_path / "run" / "profile").glob("trace-*.json"))


def test_deterministic_mode_is_passed_on(
    tmp_path: Path, data: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the run sets for its process
    try:
        assert start(make_config(tmp_path, data, deterministic=True)) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(saved_states(tmp_path / "run"), saved_states(straight))


def test_help_names_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    assert "85  SIGTERM" in capsys.readouterr().out


def test_two_ranks_train_as_one_and_survive_a_full_disk_and_a_signal_to_one_of_them(
    tmp_path: Path, data: Path, straight: Path
) -> None:
    config = make_config(tmp_path, data)
    # Rank 1 learns only from rank 0 that the save after step 2 failed.
    ranks = start_ranks(config, TINY_TERM="1:21", TINY_FULL="0")
    assert forked_ranks.finish(ranks) == [EXIT_REQUEUE] * 2, output_of(config)
    assert "rank 0: the checkpoint after step 2 could not be written" in output_of(config)
    assert saved_steps(tmp_path / "run") == [3]
    assert forked_ranks.finish(start_ranks(config)) == [0, 0], output_of(config)
    two, one = saved_states(tmp_path / "run"), saved_states(straight)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    assert losses(tmp_path / "run") == pytest.approx(losses(straight), rel=1e-5)


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path: Path, data: Path) -> None:
    config = make_config(tmp_path, data)
    assert forked_ranks.finish(start_ranks(config, TINY_NAN="19")) == [0, 0], output_of(config)
    entries = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["rank"]) for entry in entries] == [(2, 0), (2, 1)]
    assert sorted(row[0] for entry in entries for row in entry["rows"]) == list(range(16, 24))


@pytest.mark.slow
def test_an_error_on_one_rank_ends_it_at_once(tmp_path: Path, data: Path) -> None:
    config = make_config(tmp_path, data)
    assert forked_ranks.finish(start_ranks(config, TINY_RAISE="1:21")) == [EXIT_FAILED] * 2, output_of(config)
    assert "injected" in output_of(config)


@pytest.mark.slow
def test_a_frozen_rank_is_named_by_the_others_which_end(tmp_path: Path, data: Path) -> None:
    watchdog_s = 20.0
    config = make_config(tmp_path, data, watchdog_s=watchdog_s, grace_s=3.0)
    alive, frozen = start_ranks(config, TINY_STOP="1:21")
    try:
        while psutil.Process(frozen.pid).status() != psutil.STATUS_STOPPED:
            assert alive.is_alive(), output_of(config)
            time.sleep(0.01)
        began = time.monotonic()
        alive.join(900)
        took_s = time.monotonic() - began
    finally:
        forked_ranks.kill([alive, frozen])
    output = output_of(config)
    assert alive.exitcode == EXIT_HUNG, output
    print(f"a frozen rank: ended after {took_s:.1f} s, train.watchdog_s being {watchdog_s:.0f}")
    assert watchdog_s <= took_s <= watchdog_s + 30
    assert "in phase compute of step 2; rank 1 on" in output
    assert "is silent for" in output
    assert "in forward_backward" in (tmp_path / "run" / "stacks-rank-00000.txt").read_text()


@pytest.mark.slow
def test_a_slow_rank_is_named(tmp_path: Path, data: Path) -> None:
    config = make_config(tmp_path, data)
    assert forked_ranks.finish(start_ranks(config, TINY_SLOW="1:0.1")) == [0, 0], output_of(config)
    lines = read_metrics(tmp_path / "run")
    assert [list(line["stragglers"]) for line in lines] == [["1"]] * 6
    assert all(line["stragglers"]["1"] > STRAGGLER for line in lines)
    assert "slow ranks (times the median forward pass): {'1': " in output_of(config)
