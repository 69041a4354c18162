"""Tables of comma- and tab-separated values: texts with commas, quotes and line ends arrive whole, broken rows are named."""

import csv
import gzip
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from tests.data_pipeline.text.texts import TEXTS, documents

HARD = [
    *TEXTS[:50],
    'He said "no", twice',
    "two\nlines\r\nor three",
    "a\tb",
    " blanks ",
    "NA",
    "null",
    "",
    "x" * 200_000,
]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
def test_texts_arrive_whole(tmp_path: Path, name: str) -> None:
    plain = tmp_path / "plain"
    with plain.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter="\t" if "tsv" in name else ",")
        writer.writerows([("id", "text", "more"), *((number, text, "") for number, text in enumerate(HARD))])
    data = plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert documents(tmp_path / name) == HARD


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("id,body\n1,x\n", r"a\.csv: no field 'text' .found 'id', 'body'"),
        ("", r"a\.csv: no field 'text' .found none"),
        ("text,text\nx,y\n", "2 columns are called 'text'; rename all but"),
        ("id,text\n1,x\n2\n", "line 3: 1 cells, but the first line names 2 columns"),
        ("id,text\n1,x,y\n", "line 2: 3 cells, but the first line names 2 columns"),
        ('id,text\n1,"never closed\n2,x\n', r"a\.csv: cannot be read \(Error"),
    ],
)
def test_broken_tables_are_named(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=named):
        documents(tmp_path / "a.csv")


@pytest.mark.parametrize(("sign", "name"), [(";", "a.csv"), ("\t", "a.csv"), ("|", "a.csv"), (";", "a.tsv")])
def test_another_sign_between_cells_is_named_and_not_the_column_blamed(tmp_path: Path, sign: str, name: str) -> None:
    (tmp_path / name).write_text(f"id{sign}text\n1{sign}hello\n")
    with pytest.raises(
        UserError, match=r"has '.*' between names, where '.*' is expected; write it with commas"
    ) as raised:
        documents(tmp_path / name)
    assert repr(sign) in str(raised.value)
