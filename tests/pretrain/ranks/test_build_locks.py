"""Locks of killed builds go, those of running ones stay."""

import os
import time
from pathlib import Path

import pytest

from pretrain.ranks.build_locks import LOCK_AGE_S, remove_stale_build_locks


def test_only_old_build_locks_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    locks = [tmp_path / name / "lock" for name in ("old", "young")]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    then = time.time() - 2 * LOCK_AGE_S
    os.utime(locks[0], (then, then))
    assert remove_stale_build_locks() == [locks[0]]
    assert locks[1].exists()
