""".json is read whatever form of JSON it has, or refused: never silently empty."""

import gzip
import json
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers import json_values
from tests.data_pipeline.text.texts import TEXTS, by_unit, documents

RECORDS = [{"id": number, "text": text, "more": [{"text": "no"}, "]", "}"]} for number, text in enumerate(TEXTS)]
FORMS = {
    "lines": "".join(json.dumps(record) + "\n" for record in RECORDS),
    "array on one line": json.dumps(RECORDS),
    "array, a record a line": "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
    "indented array": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "indented objects": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    "objects without line ends": "".join(map(json.dumps, RECORDS)),
    "lines behind a mark and blank ones": "\ufeff\n \n" + "".join(json.dumps(record) + "\r\n" for record in RECORDS),
}


@pytest.mark.parametrize("characters", [7, 1000, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ending", ["json", "json.gz"])
def test_every_form_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, ending: str, characters: int
) -> None:
    if form != "objects without line ends":  # by a whole line alone they are told from JSON lines
        monkeypatch.setattr(json_values, "_CHARACTERS", characters)
    data = FORMS[form].encode()
    path = tmp_path / f"a.{ending}"
    path.write_bytes(gzip.compress(data) if ending == "json.gz" else data)
    assert documents(path) == TEXTS


def test_lines_are_cut_as_jsonl_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(FORMS["lines"])
    units = by_unit(tmp_path / "a.json", 5000)
    assert len(units) > 10
    assert [text for unit in units for text in unit] == TEXTS


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"data": [{"text": "a"}]}', r"no field 'text' .found 'data'.*--text-field"),
        ('{\n "version": 1,\n "data": []\n}', r"value 1: no field 'text' .found 'version', 'data'"),
        ('["a", "b"]', "value 1: found str, expected objects"),
        ("[[1], [2]]", "value 1: found list, expected objects"),
        ('[{"text": "a"}, {"text": "b"}', "cut short, or more follows"),
        ('[{"text": "a"}] [{"text": "b"}]', "cut short, or more follows"),
        ('[{"text": "a"} {"text": "b"}]', "expected a comma"),
        ('[{"text": "a"}, {"text": "b]', "not valid JSON"),
        ('[{"text": "a"}, {"body": "b"}]', r"value 2: no field 'text' .found 'body'"),
        ('[{"text": "a"}, {"text": {"0": "b"}}]', "value 2: 'text' is dict, expected text"),
        ('"just a text"', "value 1: found str"),
        ("no JSON at all", "not valid JSON"),
    ],
)
def test_what_is_no_list_of_records_is_refused_by_name(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=named) as raised:
        documents(path)
    assert str(path) in str(raised.value)


def test_null_and_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": null}, {"text": ""}]')
    assert documents(tmp_path / "a.json") == [None, ""]
