"""The quickstart's DiT on two ranks, killed, stopped and moved between shardings: it ends as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from pretrain.checkpoint.find import saved_steps
from pretrain.faults.exit_codes import EXIT_REQUEUE
from pretrain.ranks.launcher import free_port
from pretrain.telemetry.sinks import METRICS_NAME, read_metrics
from tests.pretrain import forked_ranks, noted_run, tiny_pipeline, tiny_run
from tests.pretrain.engine_states import saved_states
from tests.pretrain.made_hosts import PYTHONPATH

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KILLS = int(os.environ.get("TEXTLDM_KILLS", "50"))
STEPS_PER_KILL, SAVE_EVERY = 3, 3
STEPS = (STEPS_PER_KILL + 1) * KILLS
"""The last quarter is slack: a kill that waits for a save may see several go by."""
END_BYTES = 8192
"""Of metrics.jsonl: more than the lines that a restart repeats."""
POLL_S = 0.01
INSIDE_A_SAVE = 0.3
"""Share of the kills that must have hit a save in progress."""


class Quickstart(NamedTuple):
    """Values of the DiT's configuration, whose run folder is yet to be named, and an uninterrupted run of it."""

    values: dict
    straight: Path

    def config(self, folder: Path) -> Path:
        """The configuration of a run in `folder`/run."""
        values = self.values | {"train": self.values["train"] | {"run": str(folder / "run")}}
        return tiny_run.write_config(folder / "config.json", values)


def shipped(name: str, data: Path, run: Path, **train: object) -> dict:
    """A shipped configuration on other data, in fp32."""
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    values["data"]["path"] = str(data)
    values["train"] |= {"run": str(run), "precision": "fp32", "eval_every": 0, **train}
    return values


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Both stages as shipped, but for the data (random rows of 32 tokens), the teacher (none), the sizes, and the steps."""
    folder = tmp_path_factory.mktemp("quickstart")
    data = tiny_pipeline.write_data(folder / "data")
    vae = shipped("quickstart_vae", data, folder / "vae", steps=2) | {"repa": {"weight": 0.0}, "schedule": {}}
    dit = shipped("quickstart_dit", data, Path(), steps=STEPS, zero_stage=2, checkpoint_every=SAVE_EVERY, log_every=1)
    vae["model"] |= {"latent_dim": 16, "width": 32, "head_dim": 16}
    dit["model"] |= {"latent_dim": 16, "width": 64, "num_layers": 2, "head_dim": 16}
    dit["model"]["vae"], dit["flow"]["statistics_rows"] = str(folder / "vae"), 8
    dit["schedule"]["warmup_steps"] = 10
    assert forked_ranks.finish(forked_ranks.start(tiny_run.write_config(folder / "vae.json", vae), ranks=1)) == [0]
    made = Quickstart(dit, folder / "run")
    config = made.config(folder)
    codes = forked_ranks.finish(forked_ranks.start(config, module="tests.pretrain.noted_run"))
    assert codes == [0, 0], config.with_suffix(".log").read_text()[-5000:]
    return made


def losses(run: Path) -> list[float]:
    """Of every step."""
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def last_step(run: Path) -> int:
    """The highest of the steps at the end of the log, which is all that is read: this is asked a hundred times a second."""
    steps = [0]
    with contextlib.suppress(FileNotFoundError), open(run / METRICS_NAME, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
        for line in file.read().splitlines():
            with contextlib.suppress(ValueError):  # cut off, or being written
                entry = json.loads(line)
                steps.append(entry["step"] if entry["kind"] == "train" else 0)
    return max(steps)


def unfinished(run: Path) -> set[tuple[str, int]]:
    """What a save that is in progress, or was killed, has not yet renamed or removed: names, and numbers that tell copies apart."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
        found = {(path.name, path.stat().st_ino) for path in (run / "checkpoints").glob("*.*")}
    return found


def await_while_alive(processes: list[BaseProcess], reached: Callable[[], object], seconds: float = 900) -> None:
    """Until the condition holds, or the ranks end by themselves."""
    wait_for(lambda: reached() or not all(process.is_alive() for process in processes), seconds)


def wait_for(reached: Callable[[], object], seconds: float = 900) -> None:
    """Until the condition holds."""
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s"
        time.sleep(POLL_S)


def assert_as_straight(quickstart: Quickstart, run: Path) -> None:
    """The bits of the uninterrupted run, in every tensor at the end and every loss on the way."""
    found, expected = saved_states(run), saved_states(quickstart.straight)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert losses(run) == losses(quickstart.straight)


def test_killed_again_and_again_it_ends_with_the_same_bits(quickstart: Quickstart, tmp_path: Path) -> None:
    config, run, rng = quickstart.config(tmp_path), tmp_path / "run", random.Random(0)
    hits = dict.fromkeys(("before a step", "between saves", "inside a save"), 0)
    for number in range(KILLS):
        left = unfinished(run)
        processes, began = forked_ranks.start(config, module="tests.pretrain.slow_disk"), time.monotonic()
        # Spread over the run: not before this step, but for those that hit the start.
        step, aim = STEPS_PER_KILL * number, rng.choice(["start", "step", "save", "save"])
        first = last_step(run)
        if aim == "start":
            pause_s = rng.uniform(0, 2)
            await_while_alive(processes, lambda: time.monotonic() > began + pause_s)  # noqa: B023
        elif aim == "step":
            await_while_alive(processes, lambda: last_step(run) > max(first, step))  # noqa: B023
            time.sleep(rng.uniform(0, 0.1))
        else:
            await_while_alive(processes, lambda: last_step(run) >= step and unfinished(run) - left)  # noqa: B023
            time.sleep(rng.uniform(0, 0.05))
        assert all(process.is_alive() for process in processes), config.with_suffix(".log").read_text()[-5000:]
        forked_ranks.kill(processes)
        stepped = "between saves" if last_step(run) > first else "before a step"
        hits["inside a save" if unfinished(run) - left else stepped] += 1
    assert forked_ranks.finish(forked_ranks.start(config)) == [0, 0], config.with_suffix(".log").read_text()[-5000:]
    print(f"{KILLS} kills: {hits}")
    assert hits["inside a save"] >= INSIDE_A_SAVE * KILLS
    assert_as_straight(quickstart, run)


def test_moved_between_ranks_and_zero_stages_it_takes_the_same_way(quickstart: Quickstart, tmp_path: Path) -> None:
    config, run = quickstart.config(tmp_path), tmp_path / "run"
    for part, (ranks, zero_stage) in enumerate([(2, 1), (1, 3), (2, 2)]):
        sharding = ("--set", f"train.zero_stage={zero_stage}")
        processes = forked_ranks.start(config, *sharding, ranks=ranks, module="tests.pretrain.noted_run")
        if part < 2:
            await_while_alive(processes, lambda: last_step(run) >= STEPS * (part + 1) // 3)  # noqa: B023
            os.kill(processes[-1].pid or 0, signal.SIGTERM)
        code = EXIT_REQUEUE if part < 2 else 0
        assert forked_ranks.finish(processes) == [code] * ranks, config.with_suffix(".log").read_text()[-5000:]
        assert part == 2 or STEPS * (part + 1) // 3 <= saved_steps(run)[0] < STEPS
    batches, expected = noted_run.global_batches(run), noted_run.global_batches(quickstart.straight)
    assert sorted(expected) == list(range(STEPS))
    assert {len(rows) for rows in expected.values()} == {quickstart.values["data"]["rows_per_step"]}
    assert batches == expected
    assert losses(run) == pytest.approx(losses(quickstart.straight), rel=1e-5)


def of_job(config: Path) -> list[psutil.Process]:
    """The living launchers and ranks of a job."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(config) in process.cmdline():
                found.append(process)
    return found


def test_sigterm_through_the_launcher(quickstart: Quickstart, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config, run = quickstart.config(tmp_path), tmp_path / "run"
    request.addfinalizer(lambda: [process.kill() for process in of_job(config)])
    launcher, training = (
        [
            str(Path(sys.executable).with_name("deepspeed")),
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port()),
        ],
        ["--config", str(config)],
    )
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}

    def start(command: list[str], name: str) -> tuple[subprocess.Popen, Path]:
        log = tmp_path / f"{name}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                env=variables,
                cwd=CONFIGS.parent,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        before = last_step(run)
        wait_for(lambda: last_step(run) > before + 5 or process.poll() is not None)
        assert process.poll() is None, log.read_text()[-5000:]
        return process, log

    # To the launcher's whole group, as schedulers do: the ranks save, though deepspeed itself dies of the signal.
    process, log = start([*launcher, "pretrain/train.py", *training], "group")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(900) == -signal.SIGTERM
    wait_for(lambda: not of_job(config))
    assert "SIGTERM: writing a checkpoint after step" in log.read_text()
    first = last_step(run)
    assert saved_steps(run)[0] == first < STEPS

    # To deepspeed alone: it leaves its ranks to themselves, which notice, save and end too.
    process, log = start([*launcher, "pretrain/train.py", *training], "alone")
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == -signal.SIGTERM
    wait_for(lambda: not of_job(config))
    assert "the launcher's end: writing a checkpoint after step" in log.read_text()
    second = last_step(run)
    assert first < saved_steps(run)[0] == second < STEPS

    # To the supervisor alone, which signals one rank: all save, deepspeed passes their code on, and so does the supervisor.
    supervise = [sys.executable, "-m", "pretrain", "supervise", "--launcher", " ".join(launcher), "--", *training]
    process, log = start(supervise, "supervise")
    process.send_signal(signal.SIGTERM)
    assert process.wait(900) == EXIT_REQUEUE, log.read_text()[-5000:]
    assert not of_job(config)
    assert f"exits with return code = {EXIT_REQUEUE}" in log.read_text()
    assert second < saved_steps(run)[0] == last_step(run) < STEPS

    assert forked_ranks.finish(forked_ranks.start(config)) == [0, 0], config.with_suffix(".log").read_text()[-5000:]
    assert_as_straight(quickstart, run)
