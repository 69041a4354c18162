"""A process that finds torch, transformers and accelerate with what they require, and no other package: not this repository's either."""

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ASKED = ("torch", "transformers", "accelerate")
NO_GARBAGE = "import gc; gc.disable()\n"
"""Before imports that take seconds, a good part of them for looking through what was imported."""


def required(names: Sequence[str]) -> set[str]:
    """Those distributions and all that they require here, without extras."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            wanted = distribution(name).requires or []
        except PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        parsed = [Requirement(text) for text in wanted]
        waiting += [one.name for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def link_packages(folder: Path) -> Path:
    """A folder on whose path only those packages are."""
    folder.mkdir()
    for name in required(ASKED):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if re.match(r"[\w.-]*\w", file.parts[0])}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (folder / top).exists() and top != "__pycache__":
                (folder / top).symlink_to(source)
    return folder


def run(code: str, *arguments: str | Path, folder: Path) -> str:
    """Standard output of Python code in such a process, offline, with `folder` as its home and working directory."""
    packages = folder / "packages"
    if not packages.exists():
        link_packages(packages)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(packages)}
    command = [sys.executable, "-S", "-P", "-s", "-c", NO_GARBAGE + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
