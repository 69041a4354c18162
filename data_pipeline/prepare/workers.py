"""Worker processes for prepare: unordered tasks, live progress, no orphans, and clear errors for full disks and killed
workers.
"""

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from tqdm import tqdm

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import FULL

Task = TypeVar("Task")
_POLL_SECONDS = 0.2
_counter: Any = None  # set in worker processes: shared [documents, bytes of text]


class Progress:
    """Progress bar over tasks, with the rates of what they report while they run."""

    def __init__(self, name: str, total: int, unit: str):
        self._bar = tqdm(total=total, desc=name, unit="part", disable=not total, mininterval=0.5, dynamic_ncols=True)
        self._unit = unit
        self._counts = [0, 0]

    def add(self, count: int, num_bytes: int) -> None:
        """Report more of both."""
        self.show(self._counts[0] + count, self._counts[1] + num_bytes)

    def show(self, count: int, num_bytes: int) -> None:
        """Report totals."""
        self._counts = [count, num_bytes]
        seconds = max(1e-3, self._bar.format_dict["elapsed"])
        text = f"{count} {self._unit}" + (f", {num_bytes / 1e6 / seconds:.1f} MB/s" if num_bytes else "")
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(0)

    def task_done(self) -> None:
        """Count a finished task."""
        self._bar.update(1)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Workers:
    """Processes that call functions for tasks; both passes share them. With one, everything runs in this process.

    They are forked, so that they start at once with what this process has in memory: a large vocabulary, which takes a third
    of a second and 100 MB to load, is there once. Enter this before anything that starts threads, which a fork does not copy:
    reading Parquet, `datasets`, the network.
    """

    def __init__(self, number: int):
        self._number = number
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self._number > 1:
            context = get_context("fork")
            self._counter = context.Array("q", 2)
            self._pool = ProcessPoolExecutor(self._number, context, _start_worker, (self._counter,))
            self._pool.submit(os.getpid)  # the first task forks all of them
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self, function: Callable[[Task, Callable[[int, int], None]], None], tasks: Sequence[Task], progress: Progress
    ) -> None:
        """Call function(task, report) for every task, in any order. An error stops the rest."""
        if self._pool is None:
            for task in tasks:
                function(task, progress.add)
                progress.task_done()
            return
        self._counter[:] = 0, 0
        done: SimpleQueue[Future[None]] = SimpleQueue()
        unfinished = len(tasks)
        try:
            for task in tasks:
                self._pool.submit(_call, function, task).add_done_callback(done.put)
            while unfinished:
                try:
                    future = done.get(timeout=_POLL_SECONDS)
                except Empty:
                    pass
                else:
                    future.result()
                    unfinished -= 1
                    progress.task_done()
                progress.show(*self._counter[:])
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory: run the same command again to continue, "
                "with fewer --workers if it recurs"
            ) from None


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a failed write into a UserError that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        free = shutil.disk_usage(folder).free / 1e6 if folder.exists() else 0
        raise UserError(
            f"cannot write below {folder}: {error.strerror} ({free:.0f} MB free); make room or choose another "
            "--output, then run the same "
            "command again: what was finished is kept"
        ) from None


def _start_worker(counter: Any) -> None:
    """Prepare a worker: share the counter, leave the cores to the other workers, end when the parent does."""
    global _counter
    _counter = counter
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was inherited needs no looking through, which would copy its pages
    process = parent_process()

    def end_with_parent() -> None:
        if process is not None:
            process.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _call(function: Callable[[Task, Callable[[int, int], None]], None], task: Task) -> None:
    function(task, _report)


def _report(count: int, num_bytes: int) -> None:
    with _counter.get_lock():
        _counter[0] += count
        _counter[1] += num_bytes
