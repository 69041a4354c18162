"""Readers are found by name; what they meet becomes one line with a remedy that fits; others' readers join from outside."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.folders import list_folder
from data_pipeline.text.readers import registry
from data_pipeline.text.readers.base import Reader, Unit
from data_pipeline.text.readers.registry import OWN, naming, read_unit, reader, reader_of
from data_pipeline.text.tokenization import train_tokenizer

ROOT = Path(__file__).resolve().parents[4]


def test_every_reader_of_the_table_loads_and_knows_its_name() -> None:
    for name in OWN:
        assert isinstance(reader(name), Reader)
        assert reader(name).name == name


def test_units_survive_files_and_processes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    [unit] = reader("text").units(str(tmp_path / "a.txt"), 100)
    for copy in (pickle.loads(pickle.dumps(unit)), Unit(**json.loads(json.dumps(vars(unit))))):
        assert copy == unit
        assert list(read_unit(copy)) == ["a text"]


class Failing(Reader):
    """Fails as it is told."""

    file_names = re.compile(r"\.failing$")
    error: Exception

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        yield "a text"
        raise self.error


class OfAnotherLibrary(Exception):
    """Of no list of ours."""


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OfAnotherLibrary("several\nlines  of it"), "OfAnotherLibrary: several lines of it.; mend it, fetch it again"),
        (KeyError("text"), "KeyError: 'text'"),
        (TypeError(), "TypeError.;"),
        (RuntimeError("x" * 10_000), "RuntimeError: xxx.*x\\.\\.\\."),
        (RecursionError("deep"), "RecursionError: deep"),
        (PermissionError(13, "Permission denied"), "give this user the right"),
        (FileNotFoundError(2, "No such file"), "it was there when the source was opened"),
        (OSError(5, "Input/output error"), "check the disk or the mount"),
        (MemoryError(), "fewer --workers"),
        (ImportError("No module named 'x'"), "install that package"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), "convert it, for example with iconv"),
        (EOFError("ends within"), "fetch it again"),
    ],
)
def test_any_exception_is_one_line_with_its_cause_and_the_file(
    monkeypatch: pytest.MonkeyPatch, error: Exception, named: str
) -> None:
    failing = Failing("failing")
    failing.error = error
    monkeypatch.setattr(registry, "reader", lambda name: failing)
    documents = read_unit(Unit("failing", "some/file.failing", 0, 1, 1))
    assert next(documents) == "a text"
    with pytest.raises(UserError, match=named) as raised:
        list(documents)
    assert str(raised.value).startswith("source some/file.failing: cannot be read (")
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 1500


def test_the_consumers_exceptions_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    documents = read_unit(reader("text").units(str(tmp_path / "a.txt"), 100)[0])

    def consume() -> None:
        for _ in documents:
            raise KeyError("of the consumer")

    with pytest.raises(KeyError):
        consume()


TOY = '''
"""Verses: a document is what stands between lines of stars."""
import re
from data_pipeline.text.readers.base import Reader

class Verses(Reader):
    file_names = re.compile(r"\\.verse$")

    def documents(self, unit, text_field):
        with open(unit.location) as file:
            yield from file.read().split("***")
'''


def toy_package(folder: Path) -> dict[str, str]:
    """An installed package with a reader, as pip would leave it; the environment in which it is found."""
    (folder / "toy-1.0.dist-info").mkdir(parents=True)
    (folder / "toy_reader.py").write_text(TOY)
    (folder / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (folder / "toy-1.0.dist-info" / "entry_points.txt").write_text("[textldm.readers]\nverses = toy_reader:Verses\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def prepare(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """The command as a user starts it, over two processes."""
    texts = [f"the {word} cat and the {number} dogs are here" for number in range(60) for word in ("red", "blue")]
    train_tokenizer(texts, 300).save(folder / "tokenizer")
    (folder / "corpus").mkdir()
    for number in range(3):
        (folder / "corpus" / f"{number}.verse").write_text("***".join(texts[number::3]))
    (folder / "corpus" / "a.txt").write_text(texts[0])
    command = [
        sys.executable, "-m", "pretrain", "prepare", "--source", "corpus", "--tokenizer", "tokenizer", "--output", "out",
        "--row-tokens", "64", "--max-document-length", "64", "--workers", "2",
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_reader_joins_from_outside(tmp_path: Path) -> None:
    process = prepare(tmp_path, toy_package(tmp_path / "site"))
    assert process.returncode == 0, process.stderr
    assert "source corpus: 4 files, reads 3 .verse, 1 .txt" in process.stdout
    assert Manifest.load(tmp_path / "out").statistics["documents"] == 121


def test_without_it_its_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.verse").touch()
    assert list_folder(str(tmp_path)).told() == "2 files, reads 1 .txt; leaves out 1 .verse (no reader)"


def test_ours_come_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    found = reader_of(str(tmp_path / "a.jsonl"))
    assert found is not None
    assert found.name == "jsonl"


@pytest.mark.parametrize(
    "error", [MemoryError(), RecursionError("too deep"), type("PanicException", (BaseException,), {})("at lib.rs:1")]
)
def test_attacks_8_18a_whatever_a_library_runs_into_names_the_file(error: BaseException) -> None:
    with (
        pytest.raises(UserError, match=rf"source a\.parquet: cannot be read \({type(error).__name__}"),
        naming("a.parquet"),
    ):
        raise error
    for ending in (KeyboardInterrupt, SystemExit):
        with pytest.raises(ending), naming("a.parquet"):
            raise ending
