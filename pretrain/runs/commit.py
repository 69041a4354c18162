"""Which code it was."""

import functools
import subprocess
from pathlib import Path


@functools.cache
def source_commit() -> str:
    """Commit of this code's checkout, "-dirty" behind it where files differ; empty outside a repository, as when it was installed."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        return ""
