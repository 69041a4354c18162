"""Fixtures shared by the whole suite."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real text, tokenizers and a tiny real teacher, beside the repository; tests that need it skip without it."""
    folder = Path(__file__).resolve().parent.parent.parent / "shared"
    if not (folder / "teachers").is_dir():
        pytest.skip("needs ../shared (real text, tokenizers and a teacher), which is not part of the repository")
    return folder
