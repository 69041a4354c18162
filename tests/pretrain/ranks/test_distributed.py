"""A real start of two ranks with timeouts in every group."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from pretrain.ranks import distributed
from pretrain.ranks.launcher import free_port
from tests.pretrain.engine_launch import rank_environment

WORKER = """
import os, sys, time, torch.distributed as dist
from pathlib import Path
from pretrain.ranks.distributed import all_reduce_sum, any_rank, barrier, bytes_of_rank_0, init_distributed, shutdown
folder = Path(sys.argv[1])
(folder / os.environ["RANK"]).touch()
while len(list(folder.iterdir())) < 2:  # imports may take longer than the timeout
    time.sleep(0.01)
topology = init_distributed(timeout_s=3)
assert all_reduce_sum([topology.rank, 0.1]) == [1.0, 0.2]
assert any_rank(topology.rank == 1) and not any_rank(False)
told = bytes(range(256)) * 9
assert bytes_of_rank_0(told if topology.rank == 0 else b"mine") == told
assert bytes_of_rank_0(b"" if topology.rank == 0 else b"mine") == b""
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


def test_numbers_of_hosts_go_past_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a group of their own where the default group is one of GPUs: else they would wait for all that is queued there."""
    met: list[tuple[str, object]] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda total, group=None: met.append((total.device.type, group)))
    monkeypatch.setattr(distributed, "_host_group", "hosts")
    assert distributed.all_reduce_sum([1.5]) == [1.5]
    assert met == [("cpu", "hosts")]
