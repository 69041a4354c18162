"""Every kind of source gives the same documents, its units tile it, and what cannot be read is named."""

import gzip
import json
import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text import sources, units
from data_pipeline.text.sources import open_source, source_name
from data_pipeline.text.units import read_unit

TEXTS = [f"Document number {i}. " + "Wörter und Zeichen — " * (i % 7) for i in range(1000)]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_bytes(
        b"".join(json.dumps({"text": text, "title": "t"}, ensure_ascii=False).encode() + b"\n" for text in texts)
    )
    return path


def by_unit(spec: Path) -> list[list[str]]:
    source = open_source(str(spec))
    return [list(read_unit(unit)) for unit in source.units]


@pytest.mark.parametrize("unit_bytes", [1, 50, 1000, 10**7])
def test_byte_ranges_of_jsonl_hold_every_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[: 20 if unit_bytes == 1 else 1000])
    units = by_unit(path)
    assert len(units) == -(-path.stat().st_size // unit_bytes)
    assert [text for unit in units for text in unit] == TEXTS[: 20 if unit_bytes == 1 else 1000]


def test_a_small_file_is_work_for_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(sources, "UNIT_BYTES", path.stat().st_size + 1)
    units = by_unit(path)
    assert len(units) in (16, 17)
    assert [text for unit in units for text in unit] == TEXTS


def test_a_missing_last_newline_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}')
    assert list(open_source(str(path))) == ["one", "two"]


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_compressed_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    monkeypatch.setattr("data_pipeline.text.units._LINES_PER_BLOCK", 16)
    path = compress(write_jsonl(tmp_path / "a.jsonl"), ending)
    units = by_unit(path)
    assert len(units) > 2
    assert all(units)
    assert sorted(text for unit in units for text in unit) == sorted(TEXTS)


def compress(path: Path, ending: str) -> Path:
    target = path.with_name(path.name + "." + ending)
    if ending == "gz":
        target.write_bytes(gzip.compress(path.read_bytes()))
    else:
        zstandard = pytest.importorskip("zstandard")
        half = len(path.read_bytes()) // 2  # two frames, as parallel compressors write them
        data = path.read_bytes()
        target.write_bytes(zstandard.compress(data[:half]) + zstandard.compress(data[half:]))
    return target


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_was_cut_short_is_refused(tmp_path: Path, ending: str) -> None:
    path = compress(write_jsonl(tmp_path / "a.jsonl"), ending)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match="cannot be read"):
        list(open_source(str(path)))


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\fThree.\n")
    (tmp_path / "a.txt").write_bytes("\ufeffÄrger.\r\n<|endoftext|>\r\nOf Windows.\r\n".encode())
    assert list(open_source(str(tmp_path))) == ["Ärger.", "Of Windows.", "One.\n\nStill one.", "Two.", "Three."]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 100_000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_ranges_of_text_hold_every_document_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unit_bytes: int, ending: str
) -> None:
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
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    units = by_unit(path)
    assert len(units) > 2 or unit_bytes > len(text)
    assert [document for unit in units for document in unit] == expected
    assert list(open_source(str(tmp_path / "b.txt.gz"))) == expected


def test_parquet_with_the_columns_of_openwebtext2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    monkeypatch.setattr(sources, "UNIT_BYTES", 500)
    table = pyarrow.table({"title": ["t"] * 1000, "text": TEXTS, "reddit_scores": [[1, 2]] * 1000})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=100)
    units = by_unit(tmp_path)
    assert len(units) > 2
    assert [text for unit in units for text in unit] == TEXTS
    with pytest.raises(UserError, match=r"title.*--text-field"):
        list(open_source(str(tmp_path), "body"))
    (tmp_path / "part-1.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"part-1\.parquet: not a readable Parquet"):
        open_source(str(tmp_path))


def test_saved_and_streamed_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(sources, "_SAVED_ROWS", 300)
    dataset = datasets.Dataset.from_dict({"text": TEXTS, "title": ["t"] * 1000, "reddit_scores": [[1]] * 1000})
    dataset.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(str(tmp_path / "splits"))
    for name in ("saved", "splits"):
        units = by_unit(tmp_path / name)
        assert len(units) == 4
        assert [text for unit in units for text in unit] == TEXTS
    (tmp_path / "csv").mkdir()
    dataset.remove_columns("reddit_scores").to_csv(str(tmp_path / "csv" / "a.csv"))
    assert list(open_source(str(tmp_path / "csv"))) == TEXTS


@pytest.mark.parametrize("ending", ["parquet", "jsonl.zst"])
def test_openwebtext2_streams_as_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """What happens to `owner/name`, with a local folder in place of the hub: each of its files is a unit, read by streaming."""
    datasets = pytest.importorskip("datasets")
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "data").mkdir()
    for number in range(3):
        texts = TEXTS[number::3]
        columns = {"title": ["t"] * len(texts), "text": texts, "reddit_scores": [[1, 2]] * len(texts)}
        path = tmp_path / "data" / f"part-{number}.{ending}"
        if ending == "parquet":
            datasets.Dataset.from_dict(columns).to_parquet(path)
        else:
            lines = "".join(json.dumps(dict(zip(columns, row))) + "\n" for row in zip(*columns.values()))
            path.write_bytes(zstandard.compress(lines.encode()))
    monkeypatch.setattr(datasets, "load_dataset", partial(_instead_of_the_hub, datasets.load_dataset, tmp_path))
    units.load_streamed.cache_clear()
    source = open_source("segyges/OpenWebText2")
    assert source.name == "segyges/OpenWebText2"
    assert [unit.kind for unit in source.units] == ["streamed"] * 3
    assert [text for unit in source.units for text in read_unit(unit)] == [t for n in range(3) for t in TEXTS[n::3]]


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("mlfoundations/dclm-baseline-1.0", ("mlfoundations/dclm-baseline-1.0", None, None)),
        ("owner/name@v1.0", ("owner/name", None, "v1.0")),
        ("wikimedia/wikipedia:20231101.en", ("wikimedia/wikipedia", "20231101.en", None)),
        ("allenai/c4:en@refs/convert/parquet", ("allenai/c4", "en", "refs/convert/parquet")),
    ],
)
def test_names_of_the_hub(spec: str, asked: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple] = []

    def load_dataset(name: str, configuration: str | None, *, revision: str | None, **_: object) -> object:
        calls.append((name, configuration, revision))
        return datasets.Dataset.from_dict({"text": TEXTS[:4]}).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    units.load_streamed.cache_clear()
    assert list(open_source(spec)) == TEXTS[:4]
    assert calls == [asked]


def test_what_datasets_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: object, **__: object) -> None:
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    units.load_streamed.cache_clear()
    with pytest.raises(UserError, match=r"hub does not give.*\['en', 'de'\].*owner/name:configuration"):
        open_source("owner/name")
    (tmp_path / "x.csv").write_text("a\n")
    with pytest.raises(UserError, match=r"cannot load this folder \(Config name"):
        open_source(str(tmp_path))
    for name in ("owner/gone.txt", "owner/gone.jsonl.zst", "./gone"):
        with pytest.raises(UserError, match="no such file or folder"):
            open_source(name)


def _instead_of_the_hub(load_dataset: Callable, folder: Path, *names: str | None, **options: object) -> object:
    assert names == ("segyges/OpenWebText2", None)
    assert options == {"split": "train", "streaming": True, "revision": None}
    return load_dataset(str(folder), split="train", streaming=True)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b"{broken", "byte 16: not valid JSON"),
        (b"[1]", "found list"),
        (b'{"title": "x"}', "'title'.*--text-field"),
        (b'{"text": 5}', "is int, expected text"),
        (b'{"text": "\xff"}', "not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, named: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(UserError, match=named):
        list(open_source(str(path)))


def test_missing_text_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "x"}\n')
    assert list(open_source(str(tmp_path / "a.jsonl"))) == ["", "x"]


def test_what_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d b \ud83d\ude00 \udc00"}')
    assert list(open_source(str(tmp_path / "a.jsonl"))) == ["a \ufffd b \U0001f600 \ufffd"]


@pytest.mark.parametrize("spec", ["nowhere.jsonl", "./nowhere", "/no/where", "x.csv"])
def test_missing_sources_are_refused_without_asking_the_hub(spec: str) -> None:
    with pytest.raises(UserError, match="no such file or folder; expected"):
        open_source(spec)


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        (["x/train-0.jsonl", "x/validation-0.jsonl", "x/test-0.jsonl"], 1, "reads 1 .jsonl, leaves out 2 .jsonl"),
        (["train/0.jsonl", "train/1.jsonl", "x.jsonl", "test/0.jsonl"], 2, "reads 2 .jsonl, leaves out 2 .jsonl"),
        (["0.jsonl", "latest.jsonl", "trains.jsonl"], 3, ""),
        (["train-0.jsonl", "train-1.jsonl"], 2, ""),
        (["1.jsonl", "test/0.jsonl"], 2, ""),
        (["v1.0-a.jsonl", "b.jsonl.xz", "c.json", "d.json"], 1, "reads 1 .jsonl, leaves out 2 .json, 1 .jsonl.xz"),
    ],
)
def test_of_a_folder_the_train_split_is_read_and_the_rest_named(
    tmp_path: Path, names: list[str], read: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert list(open_source(str(tmp_path))) == names[:read]
    assert capsys.readouterr().out == (f"source {tmp_path}: {said}\n" if said else "")


@pytest.mark.parametrize("ending", ["txt", "TXT"])
def test_a_licence_is_not_the_corpus(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"LICENSE.{ending}").write_text("Permission is granted")
    for number in range(2):
        with gzip.open(tmp_path / f"c4-{number}.json.gz", "wt") as file:
            file.write(json.dumps({"text": "a text"}) + "\n")
    with pytest.raises(UserError, match=rf"holds 2 \.json\.gz, 1 \.{ending}, and either"):
        open_source(str(tmp_path))
    (tmp_path / f"LICENSE.{ending}").unlink()
    units.load_streamed.cache_clear()
    assert list(open_source(str(tmp_path))) == ["a text"] * 2


def test_useless_folders_and_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="no saved dataset"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="unknown kind"):
        open_source(str(tmp_path / "a.bin"))


def test_names_hold_no_folders_of_this_machine(tmp_path: Path) -> None:
    assert source_name(str(write_jsonl(tmp_path / "a.jsonl"))) == "a.jsonl"
    assert source_name("owner/name@main") == "owner/name@main"
