"""What all benchmarks share: interleaved repetitions, where a figure was taken, and the last line of output."""

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_pipeline.core.errors import UserError
from pretrain.runs.commit import source_commit

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
"""Real text, tokenizers and a small teacher beside the repository; every benchmark takes others by flags."""
PACKAGES = ("torch", "tokenizers", "transformers", "numpy")


def existing(path: Path, flag: str) -> Path:
    """The path, or UserError if nothing is there."""
    if not path.exists():
        raise UserError(f"{path} does not exist: it is not part of the repository; name another with {flag}")
    return path


@dataclass(frozen=True)
class Spent:
    """What a call took. `cpu_s`: of all threads, and of child processes that ended meanwhile; hardly moved by other programs."""

    wall_s: float
    cpu_s: float

    @classmethod
    def by(cls, function: Callable[[], object]) -> "Spent":
        """Call the function."""
        wall, cpu = time.perf_counter(), _cpu_seconds()
        function()
        return cls(time.perf_counter() - wall, _cpu_seconds() - cpu)


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Say what begins, and what it took when it is done."""
    print(f"{title} ...", flush=True)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    yield
    print(f"{title}: {time.perf_counter() - wall:.1f} s, {_cpu_seconds() - cpu:.1f} s of processor time", flush=True)


def interleaved(contenders: Mapping[str, Callable[[], object]], repetitions: int, title: str) -> dict[str, Spent]:
    """Medians over repetitions in turn: A B, then B A, and so on, so that a drift of the machine meets all of them alike."""
    if repetitions < 1:
        raise UserError(f"--repetitions {repetitions}: expected at least 1")
    found: dict[str, list[Spent]] = {name: [] for name in contenders}
    with tqdm(total=repetitions * len(contenders), desc=title, dynamic_ncols=True) as bar:
        for repetition in range(repetitions):
            for name in list(contenders)[:: 1 if repetition % 2 == 0 else -1]:
                bar.set_postfix_str(name)
                found[name].append(Spent.by(contenders[name]))
                bar.update()
    return {
        name: Spent(statistics.median(s.wall_s for s in spent), statistics.median(s.cpu_s for s in spent))
        for name, spent in found.items()
    }


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement, and how many programs run or wait for a core at its end."""
    return {
        "machine": {"processor": _processor(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "load_average": round(os.getloadavg()[0], 2),
        "commit": source_commit() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def print_figures(figures: Mapping[str, Any]) -> None:
    """The benchmark's last line: one JSON object of its figures and their surroundings."""
    print(json.dumps({**figures, **surroundings()}), flush=True)


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
