"""Plain text: separators part documents, and units tile the file."""

import gzip
import random
import re
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from tests.data_pipeline.text.texts import by_unit, documents


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\fThree.\n")
    (tmp_path / "a.txt").write_bytes("\ufeffÄrger.\r\n<|endoftext|>\r\nOf Windows.\r\n".encode())
    assert documents(tmp_path) == ["Ärger.", "Of Windows.", "One.\n\nStill one.", "Two.", "Three."]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 100_000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_ranges_hold_every_document_once(tmp_path: Path, unit_bytes: int, ending: str) -> None:
    """Against all of the text split at once; a compressed file is one unit."""
    pieces = [
        "Ärger",
        "<|endoftext|>",
        "a\fb",
        "",
        "<|endoftext|> \t",
        "is <|endoftext|> no mark",
        "\f",
        "x\f<|endoftext|>",
    ]
    generator = random.Random(0)
    text = ending.join(generator.choices(pieces, k=150))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    expected = [piece.strip() for piece in re.split(r"(?m)\f|^<\|endoftext\|>[ \t\r]*$", text)]
    units = by_unit(path, unit_bytes)
    assert len(units) > 2 or unit_bytes > len(text)
    assert [document for unit in units for document in unit] == expected
    assert documents(tmp_path / "b.txt.gz") == expected


def test_an_empty_file_is_an_empty_document(tmp_path: Path) -> None:
    for name, content in (("a.txt", b""), ("b.txt", b" \n"), ("c.txt", b"text"), ("d.txt.gz", gzip.compress(b""))):
        (tmp_path / name).write_bytes(content)
    assert documents(tmp_path) == ["", "", "text", ""]


def test_a_file_of_one_line_is_one_document_of_its_first_unit(tmp_path: Path) -> None:
    (tmp_path / "text8.txt").write_text("word " * 10_000)
    assert [len(unit) for unit in by_unit(tmp_path / "text8.txt", 1000)] == [1] + [0] * 49


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_another_encoding_is_refused_with_its_remedy(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("Ärger über Größe".encode(encoding))
    with pytest.raises(UserError, match=r"a\.txt: cannot be read .*it is not UTF-8: convert it"):
        documents(tmp_path)


@pytest.mark.parametrize(
    "data", ["no mark in front".encode("utf-16-le"), bytes(4096), b"ELF" + bytes(100) + b"x" * 100]
)
def test_zero_bytes_are_no_text(tmp_path: Path, data: bytes) -> None:
    """They are valid UTF-8, so that nothing else would refuse them."""
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.txt: holds \d+ zero bytes in .*iconv -f utf-16le"):
        documents(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"a stray \0 in a text")
    assert documents(tmp_path) == ["a stray \0 in a text"]
