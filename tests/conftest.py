"""Fixtures shared by the whole suite, and what lets its files run side by side."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from data_pipeline.core.imports import begin_imports, end_imports

begin_imports()  # until all test modules are imported
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As of what a script starts behind it, and of whatever that starts. Tests interrupt programs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers share the cores

LONGEST_FIRST = (
    "test_interruptions",
    "test_two_hosts",
    "test_three_hosts",
    "test_slurm",
    "test_recipe",
    "test_combinations",
    "test_kills",
    "test_train",
    "test_precision",
    "test_mistakes_under_launchers",
    "test_states",
    "test_convert",
    "test_engine",
    "test_stages_sharded",
    "test_outside",
    "test_command",
)
"""Files that take a quarter of a minute or more: begun last, one of them would keep a single worker busy at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files in the order in which xdist deals them out."""
    rank = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish() -> None:
    """Lend absl, which the metrics' packages import, no stream that is pytest's: it closes the one that it found when logging is set up
    anew, as a server does, unless that is sys.stderr at the moment; under capsys it is not.
    """
    end_imports()  # the tests' modules are all there
    if "absl.logging" in sys.modules:
        sys.modules["absl.logging"].get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(scope="module", autouse=True)
def own_environment() -> Iterator[None]:
    """Give back the environment as a file's tests found it, and denormal numbers.

    A job of one process in the tests' own process leaves its rendezvous there, on whose port it still listens: the jobs that
    the next file starts would try to as well.
    """
    with mock.patch.dict(os.environ):
        yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real text, tokenizers and a tiny real teacher, beside the repository; tests that need it skip without it."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not (folder / "teachers").is_dir():
        pytest.skip("needs ../shared (real text, tokenizers and a teacher), which is not part of the repository")
    return folder
