"""A real Slurm on two hosts: the shipped script preempted twice, arrays of prepare and cache, and what starts within an allocation.

A start takes some 17 s of processor time: each shows several things.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline import cache_features
from data_pipeline.prepare import __main__ as prepare
from data_pipeline.text.tokenization import train_tokenizer
from pretrain.jobs.requeue import ledger
from pretrain.telemetry.sinks import read_metrics
from tests.data_pipeline.prepare.test_command import TEXTS, contents
from tests.data_pipeline.test_cache_features import FAST, write_teacher
from tests.pretrain import forked_ranks, tiny_run
from tests.pretrain.engine_states import saved_states
from tests.pretrain.made_hosts import PYTHONPATH, REPOSITORY, held, made_hosts, wait_for
from tests.pretrain.slurm_cluster import Slurm, slurm_cluster, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

STEPS, PREEMPTED_AFTER = 120, (5, 40)
JOB_S = 900


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with made_hosts(tmp_path_factory.mktemp("network")) as network:
        network.environment.update(
            OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(network.folder), PYTHONPATH=PYTHONPATH, PYTHON=sys.executable
        )
        with slurm_cluster(network) as made:
            yield made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.write_data(tmp_path_factory.mktemp("data") / "data")


def write_config(data: Path, folder: Path, name: str, **train: object) -> Path:
    """The configuration of a run `folder`/`name`."""
    values = tiny_run.config_values(data, folder / name, eval_every=0, zero_stage=1, **train)
    return tiny_run.write_config(folder / f"{name}.json", values)


def undisturbed(data: Path, folder: Path, ranks: int, **train: object) -> Path:
    """The run folder of the same on one host, by plain python."""
    config = write_config(data, folder, f"undisturbed-{ranks}", **train)
    codes = forked_ranks.finish(forked_ranks.start(config, ranks=ranks), JOB_S)
    assert codes == [0] * ranks, config.with_suffix(".log").read_text()[-5000:]
    return config.with_suffix("")


def assert_equal(run: Path, expected: Path) -> None:
    """The same bits in every tensor at the end, the same loss in every step."""
    found_state, expected_state = saved_states(run), saved_states(expected)
    assert found_state.keys() == expected_state.keys()
    assert [key for key in found_state if not torch.equal(found_state[key], expected_state[key])] == []
    assert [line["loss"] for line in read_metrics(run)] == [line["loss"] for line in read_metrics(expected)]


def test_the_script_is_preempted_twice_requeued_and_ends_with_the_same_bits(
    slurm: Slurm, data: Path, tmp_path: Path
) -> None:
    settings = {"steps": STEPS, "checkpoint_every": 50}
    config, log = write_config(data, tmp_path, "run", **settings), tmp_path / "log"
    run = tmp_path / "run"

    def await_step(step: int) -> None:
        def reached() -> bool:
            assert slurm.state(job) in {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING"}, log.read_text()[-5000:]
            return (run / "metrics.jsonl").exists() and any(line["step"] >= step for line in read_metrics(run))

        wait_for(reached, JOB_S, f"step {step} was not reached", poll_s=0.1)

    sizes = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    job = slurm.submit(*sizes, "configs/cluster/slurm.sbatch", str(config))
    await_step(PREEMPTED_AFTER[0])
    with held(slurm.network.hosts):
        slurm.command("scancel", "--signal=USR1", job)  # as --signal=USR1@180 does: to the ranks, not to the script
    await_step(PREEMPTED_AFTER[1])  # by the second start
    with held(slurm.network.hosts):  # as another job's preemption does: SIGTERM, and KillWait later SIGKILL
        slurm.command("scontrol", "requeue", job)
    expected = undisturbed(data, tmp_path, ranks=2, **settings)
    slurm.await_end(job, JOB_S)

    said = log.read_text()
    assert slurm.restarts(job) == 2, said[-5000:]
    # Rank 0 tells, which may have heard of it from the other rank before its own signal came.
    assert re.search(
        r"^(SIGUSR1|a signal on another rank): writing a checkpoint after step \d+, then exit code 85$",
        said,
        re.MULTILINE,
    )
    assert "started again: exit code 85" in said
    assert said.count("resuming ") == 2
    assert not ledger(run).exists()
    assert_equal(run, expected)


def test_arrays_of_prepare_and_cache_write_the_bytes_of_one_process(slurm: Slurm, tmp_path: Path) -> None:
    """By the very lines of docs/cluster.md, with two tasks each."""
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer(TEXTS, 300).save(tmp_path / "tokenizer")
    arguments = [
        "--source",
        str(tmp_path / "my.jsonl"),
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--row-tokens",
        "256",
    ]
    arguments += ["--max-document-length", "32", "--min-document-length", "5", "--workers", "1", "--output"]
    whole = tmp_path / "whole"
    assert prepare.main([*arguments, str(whole)]) == 0
    teacher = ["--teacher", str(write_teacher(tmp_path / "teacher", whole)), "--device", "cpu", *FAST]
    assert cache_features.main(["--data", str(whole), "--output", str(tmp_path / "features"), *teacher]) == 0

    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"(?:^    .*\n)*^    .*--array.*\n(?:^    .*\n)*", page, re.MULTILINE)
    made = tmp_path / "made"
    replaced = {
        "textldm prepare --source my.jsonl --tokenizer Qwen/Qwen3-1.7B --output data/mine": shlex.join(
            [sys.executable, "-m", "pretrain", "prepare", *arguments, str(made)]
        ),
        "textldm cache --data data/mine --teacher Qwen/Qwen3-1.7B": shlex.join(
            [sys.executable, "-m", "pretrain", "cache", "--data", str(made), "--output", f"{made}-features", *teacher]
        ),
        "0-3": "0-1",
        "_ID/4": "_ID/2",
        "WORLD_SIZE=4": "WORLD_SIZE=2",
    }
    for text, value in replaced.items():
        assert text in block
        block = block.replace(text, value)
    output = slurm.command("bash", "-euc", block, environment={"SBATCH_OUTPUT": f"{tmp_path}/%A-%a.log"})
    slurm.await_end(output.split()[-1], JOB_S)
    assert contents(made) == contents(whole)
    assert contents(Path(f"{made}-features")) == contents(tmp_path / "features")


PROBE = """
import os
from data_pipeline.core.environment import launch
print("found", launch(os.environ).rank, launch(os.environ).world_size, flush=True)
"""


def test_within_an_allocation_python_and_deepspeed_behave_as_outside(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    python = shlex.quote(sys.executable)
    (tmp_path / "probe.py").write_text(PROBE)
    probe = f"{python} {tmp_path}/probe.py"
    configs = {name: write_config(data, tmp_path, name, steps=4) for name in ("python", "deepspeed")}
    script = f"""
        {probe}
        srun --ntasks=1 {probe}
        srun --ntasks=2 {probe} | sort
        script --quiet --return --command "srun --ntasks=2 --pty {probe}" /dev/null | tr -d '\\r'
        {python} pretrain/train.py --config {configs["python"]}
        srun --ntasks=1 deepspeed --num_accelerators 2 pretrain/train.py --config {configs["deepspeed"]}
    """
    said = slurm.command("salloc", "--nodes=1", "--ntasks=2", "bash", "-euo", "pipefail", "-c", script, timeout_s=JOB_S)
    assert re.findall(r"found (\d \d)", said) == ["0 1", "0 1", "0 2", "1 2", "0 1"], said
    assert_equal(tmp_path / "python", undisturbed(data, tmp_path, ranks=1, steps=4))
    assert_equal(tmp_path / "deepspeed", undisturbed(data, tmp_path, ranks=2, steps=4))
