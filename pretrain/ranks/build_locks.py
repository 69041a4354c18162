"""Locks that killed builds of torch extensions left behind."""

import os
import time
from pathlib import Path

from data_pipeline.core.home import settle_home

LOCK_AGE_S = 900
"""A lock of torch's extension builder older than this is of a killed build (the longest real one takes 5 minutes)."""


def remove_stale_build_locks() -> list[Path]:
    """Delete locks that killed builds of torch extensions left behind: each would hang the next start silently."""
    settle_home()
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    removed = []
    for lock in folder.glob("**/lock") if folder.is_dir() else ():
        try:
            if time.time() - lock.stat().st_mtime > LOCK_AGE_S:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # another rank was faster
            continue
    return removed
