"""Folders of `save_to_disk`: what is read does not depend on the format that they were saved with."""

import json
import shutil
from pathlib import Path

import datasets
import pytest

from data_pipeline.core.errors import UserError
from tests.data_pipeline.text.texts import TEXTS, by_unit, documents

DATASET = datasets.Dataset.from_dict({"text": TEXTS, "input_ids": [[1, 2]] * 1000})


@pytest.mark.parametrize(
    "format_",
    [
        {"type": None},
        {"type": "numpy"},
        {"type": "arrow"},
        {"type": "pandas"},
        {"type": "torch", "columns": ["input_ids"]},
        {"type": "numpy", "columns": ["text"]},
    ],
)
def test_formats_do_not_matter(tmp_path: Path, format_: dict) -> None:
    DATASET.with_format(**format_).save_to_disk(str(tmp_path / "saved"))
    assert documents(tmp_path / "saved") == TEXTS


def test_rows_are_shared_out_by_bytes(tmp_path: Path) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    units = by_unit(tmp_path / "saved", 1000)
    assert len(units) > 4
    assert [text for unit in units for text in unit] == TEXTS
    DATASET.filter(lambda row: row["text"] < "Document number 5").save_to_disk(str(tmp_path / "filtered"))
    assert documents(tmp_path / "filtered") == [text for text in TEXTS if text < "Document number 5"]


def test_of_splits_train_is_read_and_the_rest_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    splits = {"train": DATASET, "test": DATASET.select(range(3)), "validation": DATASET.select(range(5))}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "splits"))
    assert documents(tmp_path / "splits") == TEXTS
    assert "reads 1 saved dataset; leaves out 2 saved dataset (another split)" in capsys.readouterr().out
    datasets.DatasetDict({"part1": DATASET, "part2": DATASET}).save_to_disk(str(tmp_path / "parts"))
    assert documents(tmp_path / "parts") == TEXTS * 2


def test_null_empty_and_missing(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [None, "", "x"]}).save_to_disk(str(tmp_path / "saved"))
    assert documents(tmp_path / "saved") == [None, "", "x"]
    with pytest.raises(UserError, match=r"saved: no field 'body' .found 'text'"):
        documents(tmp_path / "saved", "body")


@pytest.mark.parametrize("name", ["web [v2] {a,b} #1 100%", "träume", "a::b", "file:x", "q?*"])
def test_folders_of_any_name(tmp_path: Path, name: str) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"))
    shutil.move(tmp_path / "saved", tmp_path / name)
    assert documents(tmp_path / name) == TEXTS


def test_damage_is_refused_in_one_line(tmp_path: Path) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"saved: cannot be read") as raised:
        documents(tmp_path / "saved")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["../private.arrow", "/etc/passwd", "x/../../private.arrow", "-x", "", "http://x/y.arrow"]
)
def test_attack_15c_a_saved_folder_names_tables_of_its_own(tmp_path: Path, name: str) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"))
    DATASET.save_to_disk(str(tmp_path / "private"))
    shutil.copyfile(tmp_path / "private" / "data-00000-of-00001.arrow", tmp_path / "private.arrow")
    state = json.loads((tmp_path / "saved" / "state.json").read_text())
    (tmp_path / "saved" / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": name}]}))
    with pytest.raises(UserError, match=r"a table of state\.json is "):
        documents(tmp_path / "saved")


def test_attack_15c_a_table_is_no_link(tmp_path: Path) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"))
    table = tmp_path / "saved" / "data-00000-of-00001.arrow"
    table.rename(tmp_path / "private.arrow")
    table.symlink_to("../private.arrow")
    with pytest.raises(UserError, match="is a link; put the file itself there"):
        documents(tmp_path / "saved")


def test_attack_8d_a_table_is_held_against_what_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DATASET.save_to_disk(str(tmp_path / "saved"))
    monkeypatch.setattr("data_pipeline.text.readers.arrow.LARGEST_BATCH", 1 << 10)
    with pytest.raises(UserError, match=r"arrow: message 1 unpacks to [\d,]+ bytes, and 1,024 are allowed"):
        documents(tmp_path / "saved")
