"""Parquet: row groups are shared out; the text column is named, null and empty are two things."""

import os
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.registry import read_unit
from data_pipeline.text.sources import open_source
from tests.data_pipeline.text.texts import TEXTS, by_unit, documents


def test_the_columns_of_openwebtext2(tmp_path: Path) -> None:
    table = pyarrow.table({"title": ["t"] * 1000, "text": TEXTS, "reddit_scores": [[1, 2]] * 1000})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=100)
    units = by_unit(tmp_path / "part-0.parquet", 500)
    assert len(units) > 2
    assert [text for unit in units for text in unit] == TEXTS
    with pytest.raises(UserError, match=r"part-0\.parquet: no field 'body' .found 'title', 'text'.*--text-field"):
        documents(tmp_path, "body")


def test_null_is_no_text_and_an_empty_string_is_an_empty_one(tmp_path: Path) -> None:
    pq.write_table(pyarrow.table({"text": [None, "", "x"]}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == [None, "", "x"]


@pytest.mark.parametrize("kind", ["large_string", "string_view", "dictionary"])
def test_every_kind_of_text_column(tmp_path: Path, kind: str) -> None:
    values = pyarrow.array(TEXTS[:5])
    column = values.dictionary_encode() if kind == "dictionary" else values.cast(getattr(pyarrow, kind)())
    pq.write_table(pyarrow.table({"a.text": ["no"] * 5, "text": column}), tmp_path / "a.parquet")
    assert documents(tmp_path / "a.parquet") == TEXTS[:5]


@pytest.mark.parametrize("column", [[1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": "b"}, {"a": "c"}]])
def test_another_kind_of_column_is_named(tmp_path: Path, column: list) -> None:
    pq.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet, row groups 0 to 0: 'text' is (int|bytes|list|dict), expected text"
    ):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("damage", [lambda data: b"PAR1 no", lambda data: b"", lambda data: data[: len(data) // 2]])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, damage) -> None:
    pq.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes(damage((tmp_path / "a.parquet").read_bytes()))
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read \(ArrowInvalid.*fetch it again") as raised:
        documents(tmp_path)
    assert "\n" not in str(raised.value)


def test_damage_that_shows_only_while_reading(tmp_path: Path) -> None:
    pq.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", compression="zstd")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:4] + os.urandom(200) + data[204:])
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read"):
        documents(tmp_path)


def bomb(path: Path, value_bytes: int) -> None:
    """A thousand rows that name one long text."""
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000, "int32"), pyarrow.array(["x" * value_bytes]))
    pq.write_table(pyarrow.table({"text": column}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 4096


def test_attack_8d_a_column_that_unpacks_to_gigabytes_is_read_a_little_at_a_time(tmp_path: Path) -> None:
    bomb(tmp_path / "a.parquet", 4 << 20)  # 4 GiB
    (unit,) = open_source(str(tmp_path)).units()
    before = pyarrow.default_memory_pool().bytes_allocated()
    texts = read_unit(unit, "text")
    tracemalloc.start()
    assert len(next(texts)) == 4 << 20
    assert pyarrow.default_memory_pool().bytes_allocated() - before < 128 << 20
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


def test_attack_8d_a_value_is_no_longer_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.text.readers.arrow.LONGEST_LINE", 1 << 20)
    bomb(tmp_path / "a.parquet", 1 << 20)
    assert len(documents(tmp_path / "a.parquet")) == 1000
    bomb(tmp_path / "a.parquet", (1 << 20) + 1)
    with pytest.raises(
        UserError, match=r"a\.parquet, row groups 0 to 0: a line or document of more than 1 MiB; divide"
    ):
        documents(tmp_path / "a.parquet")
