"""Datasets of the hub, with a local folder or an exception in the hub's place: it cannot be asked here."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import datasets
import pytest
import zstandard

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers import hub
from data_pipeline.text.sources import open_source
from tests.data_pipeline.text.texts import TEXTS, documents


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    hub.load_streamed.cache_clear()
    yield
    hub.load_streamed.cache_clear()


@pytest.mark.parametrize("ending", ["parquet", "jsonl.zst"])
def test_openwebtext2_streams_as_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """What happens to `owner/name`: each of its files is a unit, read by streaming."""
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
    source = open_source("segyges/OpenWebText2")
    assert source.name == "segyges/OpenWebText2"
    assert [unit.reader for unit in source.units()] == ["hub"] * 3
    assert list(source) == [text for number in range(3) for text in TEXTS[number::3]]


def _instead_of_the_hub(load_dataset: Callable, folder: Path, *names: str | None, **options: object) -> object:
    assert names == ("segyges/OpenWebText2", None)
    assert options == {"split": "train", "streaming": True, "revision": None}
    return load_dataset(str(folder), split="train", streaming=True)


@pytest.mark.parametrize(
    ("spec", "split", "asked"),
    [
        ("mlfoundations/dclm-baseline-1.0", None, ("mlfoundations/dclm-baseline-1.0", None, None, "train")),
        ("owner/name@v1.0", None, ("owner/name", None, "v1.0", "train")),
        ("wikimedia/wikipedia:20231101.en", None, ("wikimedia/wikipedia", "20231101.en", None, "train")),
        (
            "allenai/c4:en@refs/convert/parquet",
            "validation",
            ("allenai/c4", "en", "refs/convert/parquet", "validation"),
        ),
    ],
)
def test_names_of_the_hub(spec: str, split: str | None, asked: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    def load_dataset(name: str, configuration: str | None, *, revision: str | None, split: str, **_: object) -> object:
        calls.append((name, configuration, revision, split))
        return datasets.Dataset.from_dict({"text": TEXTS[:4]}).to_iterable_dataset(num_shards=2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_source(spec, split=split)) == TEXTS[:4]
    assert calls == [asked]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"),
            r"hub does not give.*\['en', 'de'\].*owner/name:configuration$",
        ),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), r"choose another split with --split$"),
        (RuntimeError("Dataset 'x' is a gated dataset on the Hub."), r"set HF_TOKEN"),
        (ConnectionError("Couldn't reach the Hub"), r"check the network"),
        (FileNotFoundError("Dataset x doesn't exist on the Hub"), r"check the name"),
        (TypeError("something\n\nnew"), r"TypeError: something new.*run the same command again"),
    ],
)
def test_what_datasets_says_is_passed_on_with_a_remedy_that_fits(
    error: Exception, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=named) as raised:
        open_source("owner/name")
    assert raised.value.__cause__ is error


def records(*rows: dict) -> object:
    """A streamed dataset of such rows."""
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def test_null_empty_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": None, "body": "a"}, {"text": "", "body": "a"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: records(*rows))
    assert documents("owner/name") == [None, ""]
    with pytest.raises(UserError, match=r"no field 'content' .found 'text', 'body'"):
        documents("owner/name", "content")
    hub.load_streamed.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: records(rows[0], rows[0]))
    with pytest.raises(UserError, match=r"'text' is null in all 2 rows of part 0 .found 'text', 'body'.*--text-field"):
        documents("owner/name")


def test_a_stream_that_breaks_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[dict]:
        yield {"text": "a"}
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    with pytest.raises(UserError, match=r"owner/name: the stream broke off .TimeoutError.*check the network"):
        documents("owner/name")


@pytest.mark.parametrize(
    "spec", ["nowhere.jsonl", "./nowhere", "/no/where", "x.csv", "owner/gone.txt", "a/b.jsonl.zst"]
)
def test_names_of_missing_files_are_not_asked_for(spec: str) -> None:
    with pytest.raises(UserError, match="no such file or folder; expected"):
        open_source(spec)


@pytest.mark.parametrize(
    "place",
    [
        "/etc/hosts",
        "~/x.txt",
        "../private.txt",
        "https://inside.example/x.txt",
        "file:///etc/hosts",
        "zip://*.txt::/x.zip",
    ],
)
def test_attack_15b_a_datasets_readme_names_files_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "private.txt").write_text("mine")
    (tmp_path / "theirs" / "a.txt").write_text("theirs")
    load, load_dataset = partial(documents, "segyges/OpenWebText2"), datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", partial(_instead_of_the_hub, load_dataset, tmp_path / "theirs"))
    for named, own in ((place, False), ("*.txt", True)):
        hub.load_streamed.cache_clear()
        readme = f"---\nconfigs:\n- config_name: default\n  data_files: {json.dumps(named)}\n---\n"
        (tmp_path / "theirs" / "README.md").write_text(readme)
        if own:
            assert load() == ["theirs"]
        else:
            with pytest.raises(UserError, match="its README names the file"):
                load()
