"""Two real hosts: the same bits as on one, whatever launches them, and down within seconds when one of them is lost.

A start takes some 17 s of processor time, most of them imports: each shows several things, and trains another stage or sharding.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pretrain.faults.exit_codes import EXIT_LOST
from pretrain.jobs.hosts import launch_variables
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import forked_ranks, tiny_pipeline, tiny_run
from tests.pretrain.engine_states import saved_states
from tests.pretrain.made_hosts import REPOSITORY, Host, Network, held, kill, made_hosts, wait_for, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

DOWN_S = 30
LAUNCH_S = 900
LONG_STEPS, LOST_AFTER = 40, 7
RUNS = {"vae-zero1": LONG_STEPS, "dit-zero3": LONG_STEPS, "vae-zero3": 4, "dit-zero1": 4}
"""Name -> steps; the long ones lose a host, or a rank, after step LOST_AFTER. The first is the VAE of the DiTs."""


class Runs(NamedTuple):
    """Configurations to be run on two hosts, and the folders of the same runs on one host with two ranks."""

    configs: dict[str, Path]
    on_one_host: dict[str, Path]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with made_hosts(tmp_path_factory.mktemp("network")) as made:
        made.environment.update(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(made.folder))
        made.environment.update(launch_variables(made.environment))
        yield made


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_pipeline.write_data(folder / "data")
    configs: dict[str, dict[str, Path]] = {"one": {}, "two": {}}
    for hosts, written in configs.items():
        for name, steps in RUNS.items():
            stage, zero_stage = name.split("-zero")
            run = folder / f"{name}-{hosts}"
            section = {"steps": steps, "zero_stage": int(zero_stage), "checkpoint_every": 5}
            if stage == "vae":
                values = tiny_run.config_values(data, run, eval_every=0, **section)
            else:
                values = tiny_pipeline.dit_values(data, folder / "vae-zero1-one", run)
                values["train"] |= section
            written[name] = tiny_run.write_config(folder / f"{run.name}.json", values)
    train_on_one_host(list(configs["one"].values()))
    return Runs(configs["two"], {name: folder / f"{name}-one" for name in RUNS})


def train_on_one_host(configs: list[Path]) -> None:
    """Two ranks of plain Python, one run after the other."""
    for config in configs:
        assert forked_ranks.finish(forked_ranks.start(config), LAUNCH_S) == [0, 0], config.with_suffix(
            ".log"
        ).read_text()


def deepspeed(cluster: Network, config: Path) -> list[str]:
    return ["deepspeed", "--hostfile", str(cluster.hostfile), "pretrain/train.py", "--config", str(config)]


def start(cluster: Network, config: Path, command: list[str]) -> tuple[subprocess.Popen, Path]:
    """The command on host1; its process and log."""
    log = config.with_name(f"{config.stem}-{time.monotonic_ns()}.log")
    return cluster.start(cluster.hosts[0], command, log), log


def finish(process: subprocess.Popen, log: Path) -> None:
    """It must succeed."""
    try:
        assert process.wait(LAUNCH_S) == 0, log.read_text()[-6000:]
    finally:
        process.kill()


def assert_as_on_one_host(runs: Runs, name: str, steps: int | None = None) -> None:
    """The same losses of every step, the same bits in every tensor at the end."""
    config = json.loads(runs.configs[name].read_text())
    run, expected = Path(config["train"]["run"]), runs.on_one_host[name]
    found_state, expected_state = saved_states(run), saved_states(expected)
    assert found_state.keys() == expected_state.keys()
    assert [key for key in found_state if not torch.equal(found_state[key], expected_state[key])] == []
    losses = [line["loss"] for line in read_metrics(run)]
    assert losses == [line["loss"] for line in read_metrics(expected)]
    assert len(losses) == RUNS[name]


def await_step(runs: Runs, name: str, step: int, process: subprocess.Popen, log: Path) -> None:
    """Until this step is logged."""

    def reached() -> bool:
        there = last_step(runs, name) >= step
        assert there or process.poll() is None, log.read_text()[-6000:]
        return there

    wait_for(reached, LAUNCH_S, f"step {step} of {name} was not reached: {log}")


def last_step(runs: Runs, name: str) -> int:
    """That is logged; 0 before the first."""
    run = Path(json.loads(runs.configs[name].read_text())["train"]["run"])
    lines = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines), default=0)


def await_end(cluster: Network, process: subprocess.Popen, log: Path) -> None:
    """The whole job, launcher included, must be down on both hosts soon."""
    began = time.monotonic()

    def down() -> bool:
        return process.poll() is not None and not of_job(cluster)

    try:
        wait_for(down, DOWN_S, "the job was not down", poll_s=0.25)
    except TimeoutError:
        left = {host.name: host.processes("train.py") for host in cluster.hosts}
        raise AssertionError(f"{left}\n{log.read_text()[-6000:]}") from None
    print(f"down on both hosts after {time.monotonic() - began:.1f} s, exit code {process.returncode}")


def of_job(cluster: Network) -> set[int]:
    """Process ids of what deepspeed runs on both hosts, ranks included."""
    return {pid for host in cluster.hosts for pid in host.job()}


def only_rank(host: Host) -> int:
    (pid,) = host.ranks()
    return pid


def test_deepspeed_trains_as_on_one_host_and_a_cut_link_ends_the_job_which_the_same_command_resumes(
    cluster: Network, runs: Runs
) -> None:
    name, second = "vae-zero1", cluster.hosts[1]
    command = deepspeed(cluster, runs.configs[name])

    process, log = start(cluster, runs.configs[name], command)
    await_step(runs, name, LOST_AFTER, process, log)
    with held(cluster.hosts):
        cluster.set_link(second, "down")
    try:
        await_end(cluster, process, log)
    finally:
        cluster.set_link(second, "up")
    assert process.returncode != 0
    assert f"rank 1 on host2 has not answered for 15 s: its host is down, or the link to it; exit code {EXIT_LOST}" in (
        log.read_text()
    )

    finish(*start(cluster, runs.configs[name], command))
    assert_as_on_one_host(runs, name)


def test_a_killed_rank_ends_the_job_and_the_supervisor_brings_it_through(cluster: Network, runs: Runs) -> None:
    name = "dit-zero3"
    arguments = ["--hostfile", str(cluster.hostfile), "--", "--config", str(runs.configs[name])]
    process, log = start(cluster, runs.configs[name], [sys.executable, "-m", "pretrain", "supervise", *arguments])
    await_step(runs, name, LOST_AFTER, process, log)
    first_start = of_job(cluster)
    with held(cluster.hosts):
        trained, began = last_step(runs, name), time.monotonic()
        kill(only_rank(cluster.hosts[1]))
    wait_for(lambda: not first_start & of_job(cluster), DOWN_S, "the job was not down", poll_s=0.25)
    print(f"a killed rank: down on both hosts after {time.monotonic() - began:.1f} s")
    await_step(runs, name, trained + 1, process, log)
    print(f"training again after {time.monotonic() - began:.1f} s")
    finish(process, log)
    said = log.read_text()
    assert "rank 1 on host2 is gone without a word" in said
    assert "(ended by SIGKILL)" in said
    assert_as_on_one_host(runs, name)


@pytest.mark.parametrize(("launcher", "name"), [("torchrun", "vae-zero3"), ("python", "dit-zero1")])
def test_other_launchers_train_the_same(launcher: str, name: str, cluster: Network, runs: Runs, tmp_path: Path) -> None:
    started = []
    for rank, host in enumerate(cluster.hosts):
        # By name, as users do; on host1 itself the name means 127.0.1.1.
        where = {"MASTER_ADDR": "host1", "MASTER_PORT": "29511"}
        script, log = ["pretrain/train.py", "--config", str(runs.configs[name])], tmp_path / f"{host.name}.log"
        if launcher == "torchrun":
            nodes = [f"--nnodes={len(cluster.hosts)}", f"--node_rank={rank}", "--nproc_per_node=1"]
            master = [f"--master_addr={where['MASTER_ADDR']}", f"--master_port={where['MASTER_PORT']}"]
            process = cluster.start(host, ["torchrun", *nodes, *master, *script], log)
        else:
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
            process = cluster.start(host, [sys.executable, *script], log, ranks | where)
        started.append((process, log))
    for process, log in started:
        finish(process, log)
    assert_as_on_one_host(runs, name)


def test_the_hosts_check_sees_both(cluster: Network, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "hosts", "check", str(cluster.hostfile), "--shared", str(tmp_path)]
    process, log = start(cluster, tmp_path / "check", command)
    finish(process, log)
    assert [line.split(",")[0] for line in log.read_text().splitlines()] == ["host1 answers", "host2 answers"]
    assert os.listdir(tmp_path) == [log.name]
    assert REPOSITORY.is_dir()
