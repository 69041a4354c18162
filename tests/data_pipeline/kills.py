"""kill -9 at random moments of a command's work, the same command again after each, until it may finish."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

from tests.forks import FORKS

_POLL_S = 0.003
_POLL_FOR_HALF_S = 0.0005  # a file is half written for a millisecond; still a pause, since the command wants the cores
_TIMEOUT_S = 120


class Tally(NamedTuple):
    """What became of the kills: all that hit a living process, those of them that left a file half written, and how often
    the command came to its end before its kill and began anew."""

    kills: int
    while_writing: int
    finished_early: int


def run_to_end(command: Callable[[], None], output: Path) -> int:
    """Run undisturbed; the largest number of finished files that `output` held at a time."""
    process, most = _start(command), 0
    while process.is_alive():
        most = max(most, len(_files(output)[0]))
        time.sleep(_POLL_S)
    process.join()
    assert process.exitcode == 0
    return most


def kill_again_and_again(
    command: Callable[[], None], output: Path, check: Callable[[], None], kills: int, num_files: int, seed: int
) -> Tally:
    """Kill the living command `kills` times or more, until a quarter of so many left a file half written; let it finish, and
    `check` the output.

    The moments are uniform over its work, measured in finished files, of which `num_files` appear until it is done. Every
    other kill hits as soon as a file is seen being written. A command that ends before its kill has its output checked too, and
    starts from nothing.
    """
    rng = random.Random(seed)
    hits = while_writing = finished_early = 0
    moments: list[int] = []
    while hits < kills or while_writing < kills // 4:
        assert hits < 5 * kills, "hardly any kill meets a file that is being written"
        moments = moments or sorted(rng.randrange(num_files) for _ in range(max(2, kills - hits)))
        before, wanted = _files(output)[1], moments.pop(0)
        process = _start(command)
        _wait(process, lambda wanted=wanted: len(_files(output)[0]) >= wanted)
        if hits % 2:
            _wait(process, lambda before=before: bool(_files(output)[1] - before), _POLL_FOR_HALF_S)
        else:
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            hits += 1
            while_writing += bool(_files(output)[1] - before)
            continue
        assert process.exitcode == 0
        check()
        shutil.rmtree(output)
        moments, finished_early = [], finished_early + 1
    run_to_end(command, output)
    check()
    return Tally(hits, while_writing, finished_early)


def _start(command: Callable[[], None]) -> ForkServerProcess:
    process = FORKS.Process(target=command)  # so that kills meet work, not start-up
    process.start()
    return process


def _wait(process: ForkServerProcess, condition: Callable[[], bool], poll_s: float = _POLL_S) -> None:
    give_up = time.monotonic() + _TIMEOUT_S
    while process.is_alive() and not condition():
        assert time.monotonic() < give_up, "the command makes no progress"
        time.sleep(poll_s)


def _files(folder: Path) -> tuple[set[str], set[str]]:
    """Finished and half-written files below the folder."""
    # Strings, and os.walk, which passes over folders that vanish while it looks: this is asked hundreds of times a second.
    paths = {f"{place}/{name}" for place, _, names in os.walk(folder) for name in names if "." in name.strip(".")}
    half = {path for path in paths if path.endswith(".tmp")}
    return paths - half, half
