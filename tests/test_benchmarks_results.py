"""The page of measured figures is that of the files beside it, and shows their digits."""

import json
from pathlib import Path

import pytest

from benchmarks.results import FOLDER, NAME, read, render
from data_pipeline.core.errors import UserError

TABLE = {
    "title": "speed",
    "date": "2026-11-25",
    "commit": "70c6593",
    "machine": "2 cores",
    "columns": ["what", "a", "b"],
    "rows": [["x", 1, None]],
}


def written(folder: Path, **changes: object) -> Path:
    path = folder / "speed.json"
    path.write_text(json.dumps({"title": "Speed", "tables": [TABLE | changes]}))
    return path


def test_page_is_that_of_its_files():
    assert (FOLDER / NAME).read_text() == render(), "run python -m benchmarks.results"


def test_digits_are_shown_as_they_were_written(tmp_path):
    rows = '[["loss", 0.470, [1.10, -2]], ["gap", {"value": [1.0, 28], "error": [0.50, 8]}, {"value": 2.50, "error": 0.10}]]'
    path = written(tmp_path, rows="ROWS")
    path.write_text(path.read_text().replace('"ROWS"', rows))
    assert "| loss | 0.470 | 1.10 -2 |\n| gap | 1.0 (0.50) 28 (8) | 2.50 (0.10) |\n" in render(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": [["x", 1]]}, "a row of 2 cells, expected 3"),
        ({"date": "yesterday"}, "date 'yesterday', expected"),
        ({"commit": "main"}, "commit 'main', expected"),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=rf"speed.json, table 0 \(speed\): {message}"):
        read(written(tmp_path, **changes))


def test_a_table_without_its_machine_is_refused(tmp_path):
    table = {key: value for key, value in TABLE.items() if key != "machine"}
    path = tmp_path / "speed.json"
    path.write_text(json.dumps({"title": "Speed", "tables": [table]}))
    with pytest.raises(UserError, match="no machine"):
        read(path)
