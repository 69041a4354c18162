"""A package that is installed for one test: nothing but its entry points."""

import sys
from pathlib import Path

import pytest


def install(folder: Path, monkeypatch: pytest.MonkeyPatch | None, group: str, **parts: str) -> None:
    """Put a distribution's metadata on the path: entry points of `group`, name = "module:attribute".

    Without `monkeypatch` it stays for the rest of the process.
    """
    metadata = folder / "toy_package-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    lines = "".join(f"{name} = {place}\n" for name, place in parts.items())
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    if monkeypatch is not None:
        monkeypatch.syspath_prepend(str(folder))
    else:
        sys.path.insert(0, str(folder))
