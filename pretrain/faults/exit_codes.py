"""The exit codes of a training process, and how it says a user's mistake. Without torch: mistakes come before slow imports."""

import signal
import sys
import time
from typing import Literal

from data_pipeline.core.errors import EXIT_USER, UserError
from pretrain.ranks.peers import EXIT_LOST

EXIT_OK, EXIT_FAILED, EXIT_REQUEUE, EXIT_HUNG, EXIT_SKIPS = 0, 1, 85, 86, 87
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_CODES = {
    EXIT_OK: "finished",
    EXIT_FAILED: "an error on some rank; its traceback says which",
    EXIT_USER: "a mistake in the input, named in one line",
    EXIT_REQUEUE: "SIGTERM, SIGUSR1 or SIGHUP: a checkpoint is written; start the same command again to go on",
    EXIT_HUNG: "no progress for train.watchdog_s; stacks are in the run folder; restarting resumes",
    EXIT_SKIPS: "too many steps with bad gradients; a restart would meet them again (skipped.jsonl)",
    EXIT_LOST: "another rank was killed or its host is out of reach, and is named; restarting resumes",
    EXIT_INTERRUPTED: "Ctrl-C: a checkpoint is written, unless it was pressed twice; the same command goes on",
}

Restart = Literal["never", "at once", "bounded"]
RESTARTS: dict[int, Restart] = {
    EXIT_OK: "never", EXIT_USER: "never", EXIT_SKIPS: "never", EXIT_INTERRUPTED: "never", EXIT_REQUEUE: "at once",
}  # fmt: skip
"""What is done after a job's exit code; of every other one, a signal's and a hang's (134 with NCCL) among them, "bounded": started again
until MAX_FAILURES starts in a row have brought no new checkpoint. The supervisor, Slurm and Kubernetes all go by this (docs/cluster.md)."""
MAX_FAILURES = 3


def restart(code: int) -> Restart:
    """Whether a job that ended with this code is started again."""
    return RESTARTS.get(code, "bounded")


def say_mistake(error: UserError, rank: int = 0) -> int:
    """Print a user's mistake on one line; the exit code."""
    if rank:  # most likely rank 0 says the same, and the launcher ends this process before it repeats it
        time.sleep(3)
    prefix = f"rank {rank}: " if rank else ""
    print(f"error: {prefix}{error}", file=sys.stderr, flush=True)
    return EXIT_USER
