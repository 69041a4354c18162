"""Parts are found by name in our table and in installed packages; one that cannot be loaded is named."""

import re
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from data_pipeline.core.errors import UserError

OWN = {"path": "pathlib:Path"}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package as pip would leave it."""
    (tmp_path / "toy-1.0.dist-info").mkdir()
    (tmp_path / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    points = "good = toy_parts:GOOD\nno_module = toy_nowhere:PART\nno_part = toy_parts:BAD\npath = toy_parts:GOOD\n"
    (tmp_path / "toy-1.0.dist-info" / "entry_points.txt").write_text(f"[textldm.things]\n{points}")
    (tmp_path / "toy_parts.py").write_text("GOOD = 7\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_own_and_others() -> None:
    assert plugins.names("things", OWN) == ["path", "good", "no_module", "no_part"]
    assert plugins.load("things", "path", OWN) is Path
    assert plugins.load("things", "good", OWN) == 7


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_module", "'no_module' of things (toy_nowhere:PART) cannot be loaded: ModuleNotFoundError"),
        ("no_part", "'no_part' of things (toy_parts:BAD) cannot be loaded: AttributeError"),
        ("unknown", "'unknown' is none of the known things: path, good"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        plugins.load("things", name, OWN)
