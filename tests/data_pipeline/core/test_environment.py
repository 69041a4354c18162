"""Reading launchers' environments: what a launcher gave to this very process counts, and nothing else."""

import os
from pathlib import Path

import pytest

from data_pipeline.core.environment import Launch, launch, rendezvous
from data_pipeline.core.errors import UserError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
ALLOCATION = {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "7", "SLURM_JOB_NODELIST": "node[03-04]", "SLURM_PROCID": "0"}
SRUN = ALLOCATION | {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4,3",
}  # fmt: skip


def test_without_a_launcher_this_is_one_process():
    assert launch({}) == Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)


def test_torchrun_and_deepspeed():
    assert launch(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}) == Launch(5, 8, 1, 4)
    assert launch(TORCHRUN | {"LOCAL_SIZE": "2"}) == Launch(5, 8, 1, 2)
    assert rendezvous(TORCHRUN) == ("h", 1)


def test_what_is_said_to_others_is_what_was_read():
    assert launch(launch(SRUN).variables()) == launch(SRUN)


@pytest.mark.parametrize(("node", "count"), [("0", 4), ("1", 4), ("2", 3)])
def test_a_task_of_srun(node: str, count: int):
    environ = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": node}
    assert launch(environ) == Launch(6, 7, 2, count)


@pytest.mark.parametrize(
    "environ",
    [
        ALLOCATION,  # python in a script of sbatch, or in a shell of salloc
        SRUN | {"SLURM_STEP_ID": "4294967290"},  # the same where salloc opens its shell in a step
        SRUN | {"SLURM_STEP_ID": "4294967291"},  # a batch script, where Slurm tells it its step
        SRUN | {"SLURM_PTY_PORT": "4711"},  # in the shell of srun --pty bash
        SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun -n 1 within a larger allocation
        {name: value for name, value in SRUN.items() if name != "SLURM_NTASKS"},  # that says of no other task
        {"WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "h", "MASTER_PORT": "1"},  # left over, without a rank
    ],
)
def test_scripts_and_shells_within_an_allocation_are_one_process(environ: dict[str, str]):
    assert launch(environ) == Launch()


def test_scontrol_names_the_first_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[03-04]" ] && printf "node03\\nnode04\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert rendezvous(SRUN) == ("node03", 23456)
    assert rendezvous(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"}) == ("10.0.0.1", 99)


def test_without_scontrol_a_single_host_is_known_and_a_list_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rendezvous(SRUN | {"SLURM_STEP_NODELIST": "gpu-7.cluster"})[0] == "gpu-7.cluster"
    with pytest.raises(UserError, match=r"SLURM_STEP_NODELIST is 'node\[03-04\]'.*scontrol.*MASTER_ADDR"):
        rendezvous(SRUN)


def test_a_failing_scontrol_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Invalid hostlist >&2; exit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match=r"failed \(Invalid hostlist\)"):
        rendezvous(SRUN)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 does not fit a job of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x', expected a number"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"}, "SLURM_LOCALID is not set"),
    ],
)
def test_incomplete_or_contradictory_environments_are_refused(environ: dict[str, str], named: str):
    with pytest.raises(UserError, match=named):
        launch(environ)


def test_a_job_that_does_not_say_where_to_meet_is_refused():
    with pytest.raises(UserError, match="MASTER_PORT is not"):
        rendezvous({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"})
