"""Pointers of Git LFS and git-annex are told from files."""

from pathlib import Path

import pytest

from data_pipeline.core.pointers import pointer

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456789\n"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS, "Git LFS"),
        ("/annex/objects/SHA256E-s5--abc.txt\n", "git-annex"),
        ("A text on https://git-lfs.github.com/spec/v1", None),
        (LFS + "a text behind it" * 100, None),
        ("", None),
    ],
)
def test_pointers(tmp_path: Path, content: str, what: str | None) -> None:
    (tmp_path / "a").write_text(content)
    found = pointer(tmp_path / "a")
    assert (found is None) if what is None else str(found).startswith(what)
