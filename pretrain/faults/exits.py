"""How a process ends: one of the codes of exit_codes.py, said in a line, promptly.

A rank that lingers leaves the others waiting in a collective operation.
"""

import contextlib
import errno
import os
import sys
import threading
import traceback

import torch

from data_pipeline.core.errors import EXIT_USER, UserError
from data_pipeline.core.storage import FULL
from data_pipeline.core.telling import tellable
from pretrain.faults.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_SKIPS, say_mistake
from pretrain.faults.spikes import TooManySkips
from pretrain.ranks.distributed import await_cause, goodbye

FLUSH_S = 5.0
"""How long the last words may take."""


def exit_code_of(error: BaseException, rank: int = 0) -> int:
    """Print what went wrong on this rank, as one line for users' mistakes and with a traceback else; the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        if not rank:
            print("interrupted before the first step: nothing new to save", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    if isinstance(error, TooManySkips):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_SKIPS
    if isinstance(error, UserError):
        return say_mistake(error, rank)
    if isinstance(error, OSError) and error.errno in (*FULL, errno.EROFS):
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror}{where}: make room there, then start the same command again", file=sys.stderr)
        return EXIT_USER
    if is_communication_error(error):
        await_cause()
    lines = tellable("".join(traceback.format_exception(error)).rstrip())
    print(f"rank {rank}:\n{lines}", file=sys.stderr, flush=True)
    if is_out_of_memory(error):
        print(f"rank {rank}: {out_of_memory_advice()}", file=sys.stderr, flush=True)
    return EXIT_FAILED


def is_communication_error(error: BaseException) -> bool:
    """True for a collective operation that failed: mostly the consequence of something on another rank."""
    gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return gloo or isinstance(error, torch.distributed.DistError)


def is_out_of_memory(error: BaseException) -> bool:
    """True for a device's or the host's failed allocation."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def out_of_memory_advice() -> str:
    """What was resident, and what to lower, cheapest first."""
    gib = 2**30
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        resident = (
            f"{torch.cuda.memory_allocated() / gib:.1f} GiB in tensors, {torch.cuda.memory_reserved() / gib:.1f} GiB"
            f" reserved, peak {torch.cuda.max_memory_allocated() / gib:.1f} GiB;"
            f" the device has {total / gib:.1f} GiB, {free / gib:.1f} free"
        )
    else:
        resident = "host memory is used up"
    return (
        f"out of memory: {resident}. Lower data.micro_batch_rows (gradients stay the same); then"
        " train.activation_checkpointing=1, a higher train.zero_stage, train.offload_optimizer=cpu or nvme"
    )


def leave(code: int) -> None:
    """End the process now, and the job's others with it: no destructor, thread or process group holds it up."""
    goodbye(code)
    forced = threading.Timer(FLUSH_S, os._exit, [code])  # a terminal that is paused
    forced.daemon = True
    forced.start()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody may read it any more
            stream.flush()
    os._exit(code)
