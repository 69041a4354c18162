"""Ranks of pretrain/train.py forked from one process that has its imports behind it: a start takes a second, not ten.

For tests that start a job again and again. The first start pays for the imports.
"""

import multiprocessing
import os
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

from pretrain.distributed import free_port

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "pretrain.train"])
"""The second brings in torch's compiler, for nothing and three seconds, when an engine is made."""


def start(config: Path, *arguments: str, ranks: int = 2, **environment: str) -> list[BaseProcess]:
    """The ranks of a job, running; their output goes to <config>.log, one behind the other's."""
    log, port = config.with_suffix(".log"), free_port()
    processes = []
    for rank in range(ranks):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in launcher.items()} | {"MASTER_ADDR": "127.0.0.1", **environment}
        command = ["--config", str(config), *arguments]
        processes.append(FORKS.Process(target=be_a_rank, args=(command, variables, str(log)), daemon=True))
        processes[-1].start()
    return processes


def be_a_rank(command: list[str], variables: dict[str, str], log: str) -> None:
    """In the new process: what `python pretrain/train.py` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.environ.update(variables)
    code = 70
    try:
        import torch

        from pretrain import train

        torch.set_num_threads(1)
        code = train.main(command)
        train.shutdown()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def kill(processes: list[BaseProcess]) -> None:
    """kill -9 of all of them, at once."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def finish(processes: list[BaseProcess], timeout_s: float = 300) -> list[int | None]:
    """Exit codes of all ranks; None for one that had to be killed."""
    try:
        for process in processes:
            process.join(timeout_s)
        return [process.exitcode for process in processes]
    finally:
        kill(processes)
