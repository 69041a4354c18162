"""Files that stand for others: what Git LFS and git-annex leave where the contents were not fetched."""

import os
from pathlib import Path

_LARGEST = 1024  # bytes; Git LFS allows its pointers no more
_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = b"/annex/objects/"


def pointer(path: str | Path) -> str | None:
    """Which program's pointer the file is, with the command that fetches the contents; None of a file that is none."""
    if os.path.getsize(path) > _LARGEST:
        return None
    with open(path, "rb") as file:
        start = file.read(_LARGEST)
    if start.startswith(_LFS):
        return "Git LFS pointer (git lfs pull)"
    return "git-annex pointer (git annex get)" if start.startswith(_ANNEX) else None
