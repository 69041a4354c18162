"""JSON lines: units tile the file, whatever compressed it; what is no line of a record is named."""

from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers import jsonl
from tests.data_pipeline.text.texts import TEXTS, by_unit, documents, write_jsonl


@pytest.mark.parametrize("unit_bytes", [1, 50, 1000, 10**7])
def test_byte_ranges_hold_every_line_once(tmp_path: Path, unit_bytes: int) -> None:
    texts = TEXTS[: 20 if unit_bytes == 1 else 1000]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    units = by_unit(path, unit_bytes)
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    assert [text for unit in units for text in unit] == texts


def test_a_missing_last_newline_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n{"text": "two"}')
    assert documents(path) == ["one", "two"]


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_compressed_lines_are_shared_out_by_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(jsonl, "_LINES_PER_BLOCK", 16)
    units = by_unit(write_jsonl(tmp_path / f"a.jsonl.{ending}"), 500)
    assert len(units) > 2
    assert all(units)
    assert sorted(text for unit in units for text in unit) == sorted(TEXTS)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{broken", "byte 16: not valid JSON.*mend the line"),
        (b"[1]", "byte 16: found list.*read if it is called"),
        (b'{"text": "a"},', "byte 16: not valid JSON .Extra data.*read if it is called"),
        (b'{"title": "x"}', "byte 16: no field 'text' .found 'title'.; name the right one with --text-field"),
        (b"{}", "byte 16: no field 'text' .found none"),
        (b'{"text": 5}', "is int, expected text"),
        (b'{"text": ["a", "b"]}', "is list, expected text"),
        (b'{"text": "\xff"}', "byte 16: not UTF-8.*iconv"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.zst"])
def test_bad_lines_are_named(tmp_path: Path, line: bytes, named: str, name: str) -> None:
    from tests.data_pipeline.text.texts import compress

    data = b'{"text": "one"}\n' + line + b"\n"
    path = tmp_path / name
    path.write_bytes(compress(data, path.suffix[1:]) if path.suffix in (".gz", ".zst") else data)
    with pytest.raises(UserError, match=named.replace("byte 16", "(byte 16|line 2)")) as raised:
        documents(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_null_is_no_text_and_an_empty_string_is_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": "x"}\n')
    assert documents(tmp_path / "a.jsonl") == [None, "", "x"]


def test_what_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d b \ud83d\ude00 \udc00"}')
    assert documents(tmp_path / "a.jsonl") == ["a \ufffd b \U0001f600 \ufffd"]


def test_a_single_long_line_costs_its_units_what_it_costs_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unit reads its own range to find that no line begins there, not the rest of the file."""
    path = write_jsonl(tmp_path / "a.jsonl", ["x" * 1_000_000])
    read = []
    original = jsonl.skip_begun_line

    def counted(file: object, start: int, stop: int) -> int:
        place = original(file, start, stop)  # type: ignore[arg-type]
        read.append(place - start)
        return place

    monkeypatch.setattr(jsonl, "skip_begun_line", counted)
    assert [len(unit) for unit in by_unit(path, 10_000)] == [1] + [0] * 100
    assert sum(read) <= path.stat().st_size
