"""kill -9 at random moments of a command's work, the same command again after each, until it may finish."""

import random
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

# Children are forked from a server that has imported what takes seconds to import, so that kills meet work, not start-up.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["data_pipeline.prepare", "data_pipeline.cache_features"])
_POLL_S = 0.001
_TIMEOUT_S = 120


class Tally(NamedTuple):
    """What became of the kills: all that hit a living process, and those of them that left a file half written."""

    kills: int
    while_writing: int


def run_to_end(command: Callable[[], None], output: Path) -> int:
    """Run undisturbed; the largest number of finished files that `output` held at a time."""
    process, most = _start(command), 0
    while process.is_alive():
        most = max(most, len(_files(output)[0]))
        time.sleep(_POLL_S)
    process.join()
    assert process.exitcode == 0
    return most


def kill_again_and_again(command: Callable[[], None], output: Path, kills: int, num_files: int, seed: int) -> Tally:
    """Kill the command `kills` times, then let it finish.

    The moments are uniform over its work, measured in finished files, of which `num_files` appear until it is done. Every
    other kill waits for a file that is being written.
    """
    rng = random.Random(seed)
    hits = while_writing = 0
    for number, wanted in enumerate(sorted(rng.randrange(num_files) for _ in range(kills))):
        before = _files(output)[1]
        process = _start(command)
        _wait(process, lambda wanted=wanted: len(_files(output)[0]) >= wanted)
        if number % 2:
            _wait(process, lambda before=before: bool(_files(output)[1] - before))
        time.sleep(rng.uniform(0, 0.02))
        hits += process.is_alive()
        process.kill()
        process.join()
        while_writing += bool(_files(output)[1] - before)
    run_to_end(command, output)
    return Tally(hits, while_writing)


def _start(command: Callable[[], None]) -> ForkServerProcess:
    process = _CONTEXT.Process(target=command)
    process.start()
    return process


def _wait(process: ForkServerProcess, condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + _TIMEOUT_S
    while process.is_alive() and not condition():
        assert time.monotonic() < give_up, "the command makes no progress"
        time.sleep(_POLL_S)


def _files(folder: Path) -> tuple[set[Path], set[Path]]:
    """Finished and half-written files below the folder."""
    paths = {path for path in folder.rglob("*") if path.suffix and not path.is_dir()}
    half = {path for path in paths if path.suffix == ".tmp"}
    return paths - half, half
