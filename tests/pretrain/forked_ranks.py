"""Ranks of pretrain/train.py, or of another program, forked from one process that has its imports behind it (tests/forks.py).

A start takes a second, not ten; the first one pays for the imports.
"""

import importlib
import os
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

from pretrain.ranks.launcher import free_port
from tests.forks import FORKS


def start(
    config: Path, *arguments: str, ranks: int = 2, module: str = "pretrain.train", **environment: str
) -> list[BaseProcess]:
    """The ranks of a training job, running; their output goes to <config>.log, one behind the other's.

    `module` is what does the training: its `main`.
    """
    return start_module(module, ["--config", str(config), *arguments], config.with_suffix(".log"), ranks, **environment)


def start_module(module: str, arguments: list[str], log: Path, ranks: int, **environment: str) -> list[BaseProcess]:
    """`main(arguments)` of a module, on every rank."""
    port, processes = free_port(), []
    for rank in range(ranks):
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in launcher.items()} | {"MASTER_ADDR": "127.0.0.1", **environment}
        process = FORKS.Process(target=be_a_rank, args=(module, arguments, variables, str(log)), daemon=True)
        process.start()
        processes.append(process)
    return processes


def be_a_rank(module: str, arguments: list[str], variables: dict[str, str], log: str) -> None:
    """In the new process: what `python <module>` does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    os.environ.update(variables)
    code = 70
    try:
        import torch

        from pretrain.ranks.distributed import shutdown

        torch.set_num_threads(1)
        code = importlib.import_module(module).main(arguments) or 0
        shutdown()
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


def finish(processes: list[BaseProcess], timeout_s: float = 900) -> list[int | None]:
    """Exit codes of all ranks; None for one that had to be killed."""
    try:
        for process in processes:
            process.join(timeout_s)
        return [process.exitcode for process in processes]
    finally:
        kill(processes)
