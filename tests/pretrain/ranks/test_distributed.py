"""Reading launchers' environments, and a real start of two ranks with timeouts in every group."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.ranks import distributed
from pretrain.ranks.distributed import first_slurm_host, launch_environment, remove_stale_build_locks
from pretrain.ranks.launcher import free_port
from tests.pretrain.engine_launch import rank_environment


def test_alone_without_a_launcher():
    found = launch_environment({})
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == (
        "0",
        "1",
        "0",
        "127.0.0.1",
    )
    assert int(found["MASTER_PORT"]) > 0


def test_torchrun_and_deepspeed():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert launch_environment(environ | {"LOCAL_WORLD_SIZE": "4"})["LOCAL_SIZE"] == "4"
    assert launch_environment(environ | {"LOCAL_SIZE": "2"})["LOCAL_SIZE"] == "2"


def test_srun():
    environ = {
        "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_NTASKS": "7", "SLURM_LOCALID": "2", "SLURM_NODEID": "1",
        "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_JOB_ID": "123456",
    }  # fmt: skip
    assert launch_environment(environ) == {
        "RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "2", "LOCAL_SIZE": "3",
        "MASTER_ADDR": "node03", "MASTER_PORT": "23456",
    }  # fmt: skip


def test_a_batch_script_without_srun_is_one_process():
    assert launch_environment({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"})["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("login,gpu[1-2]", "login"),
        ("r[2,4]-ib", "r2-ib"),
    ],
)
def test_first_host_of_slurms_lists(nodelist, first):
    assert first_slurm_host(nodelist) == first


@pytest.mark.parametrize(
    "environ", [{"RANK": "0"}, {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}]
)
def test_incomplete_or_contradictory_environments_are_refused(environ):
    with pytest.raises(UserError):
        launch_environment(environ)


def test_only_old_build_locks_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("old", "young")]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    then = time.time() - 2 * distributed.LOCK_AGE_S
    os.utime(locks[0], (then, then))
    assert remove_stale_build_locks() == [locks[0]]
    assert locks[1].exists()


WORKER = """
import os, sys, time, torch.distributed as dist
from pathlib import Path
from pretrain.ranks.distributed import all_reduce_sum, any_rank, barrier, init_distributed, shutdown
folder = Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:  # imports may take longer than the timeout
    time.sleep(0.01)
topology = init_distributed(timeout_s=3)
assert all_reduce_sum([topology.rank, 0.1]) == [1.0, 0.2]
assert any_rank(topology.rank == 1) and not any_rank(False)
group = dist.new_group([0, 1])
barrier()
if topology.rank == 1:
    time.sleep(600)
else:
    began = time.monotonic()
    try:
        dist.all_reduce(__import__("torch").ones(1), group=group)
    except RuntimeError as error:
        assert "imed out" in str(error), error
        assert time.monotonic() - began < 60
        print("timed out as it should")
"""


def test_collectives_and_the_timeout_of_groups_made_later(tmp_path: Path):
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env=rank_environment(rank, 2, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    output, _ = ranks[0].communicate(timeout=300)
    ranks[1].kill()
    ranks[1].communicate()
    assert "timed out as it should" in output
