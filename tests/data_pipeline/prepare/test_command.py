"""prepare: every kept document arrives whole, and the bytes depend on text, tokenizer and arguments alone."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare import assemble, encode, passes, spill
from data_pipeline.prepare.__main__ import main
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.reading.batch import FILLER, Split
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from data_pipeline.text import sources
from data_pipeline.text.tokenization import load_tokenizer, train_tokenizer

WORDS = "the a red blue cat dog house tree sees likes and or but very small large".split()  # noqa: SIM905


def make_texts(count: int = 1500) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, int(rng.integers(1, 120)))) + f" {i}." for i in range(count)]


TEXTS = make_texts()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a source in two files, with duplicates and empty documents, and a tokenizer."""
    folder = tmp_path_factory.mktemp("prepare")
    texts = [*TEXTS, TEXTS[3], "", "  \n", *TEXTS[5:8]]
    (folder / "source").mkdir()
    for name, part in (("a.jsonl", texts[:600]), ("b.jsonl", texts[600:])):
        (folder / "source" / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    train_tokenizer(TEXTS, 300).save(folder / "tokenizer")
    return folder


def options(place: Path, output: Path, **changes: object) -> PrepareOptions:
    fields: dict = {"row_tokens": 256, "max_document_length": 64, "min_document_length": 5, "heldout_fraction": 0.05}
    return PrepareOptions(str(place / "source"), str(place / "tokenizer"), output, **(fields | changes))


def run(place: Path, output: Path, **changes: object) -> Manifest:
    manifest = passes.prepare(options(place, output, **changes))
    assert manifest is not None
    return manifest


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, bytes]:
    run(place, place / "expected")
    return contents(place / "expected")


def windows_of(folder: Path, manifest: Manifest, split: str) -> list[list[int]]:
    rows = TokenRows(str(folder), manifest, split)
    found = []
    for index, shard in enumerate(manifest.splits[split]):
        tokens, lengths = rows.read(Span(0, index, 0, shard.rows))
        for row, windows in zip(tokens, lengths):
            for start, length in zip(np.cumsum(windows) - windows, windows):
                found.append(row[start : start + length].tolist())
    return found


@pytest.mark.parametrize("dedupe", [False, True])
def test_every_document_arrives_once_and_whole(place: Path, tmp_path: Path, dedupe: bool) -> None:
    manifest = run(place, tmp_path, dedupe=dedupe)
    tokenizer = load_tokenizer(place / "tokenizer")
    kept = TEXTS if dedupe else [*TEXTS, TEXTS[3], *TEXTS[5:8]]
    wanted: Counter = Counter()
    for text in kept:
        ids = [*tokenizer.backend.encode(text).ids, tokenizer.info.eos_id]
        lengths = prepare_windows(len(ids))
        wanted.update(tuple(ids[a:b]) for a, b in pairwise(np.cumsum([0, *lengths])))
    found = [tuple(window) for split in ("train", "heldout") for window in windows_of(tmp_path, manifest, split)]
    assert Counter(found) == wanted
    assert manifest.statistics["documents"] == len(TEXTS) + 6
    assert manifest.statistics["empty"] == 2
    assert manifest.statistics["duplicates"] == (4 if dedupe else 0)


def test_the_first_documents_alone(place: Path, tmp_path: Path) -> None:
    manifest = run(place, tmp_path, max_documents=7)
    assert manifest.statistics["documents"] == manifest.statistics["max_documents"] == 7
    assert run(place, tmp_path, max_documents=7).fingerprint == manifest.fingerprint  # finished already
    for other in (8, None):
        with pytest.raises(UserError, match=r"--max-documents was 7, now (8|'all')"):
            run(place, tmp_path, max_documents=other)


def prepare_windows(length: int) -> list[int]:
    from data_pipeline.prepare.pack import window_lengths

    return window_lengths(length, 5, 64)


def test_rows_are_full_and_shards_even(place: Path, expected: dict) -> None:
    manifest = Manifest.load(place / "expected")
    rows = [shard.rows for shard in manifest.splits["train"]]
    assert len(rows) == 48
    assert max(rows) - min(rows) <= 1
    assert manifest.fill() > 0.99
    assert 0.02 < manifest.statistics["heldout_documents"] / len(TEXTS) < 0.09


def test_split_is_by_text_alone(place: Path, expected: dict, tmp_path: Path) -> None:
    """Other rows, another order of documents and other neighbours do not move a document between train and held-out."""
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::-2]))
    changed = PrepareOptions(
        str(tmp_path / "few.jsonl"), str(place / "tokenizer"), tmp_path / "out", row_tokens=128, max_document_length=64,
        min_document_length=5, heldout_fraction=0.05, shards=2,
    )  # fmt: skip
    manifest = passes.prepare(changed)
    assert manifest is not None
    few = {tuple(window) for window in windows_of(tmp_path / "out", manifest, "heldout")}
    assert few < {
        tuple(window) for window in windows_of(place / "expected", Manifest.load(place / "expected"), "heldout")
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_bytes_do_not_depend_on_workers_units_or_chunks(
    place: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(encode, "CHUNK_TOKENS", 3000)
    monkeypatch.setattr(encode, "_BATCH_CHARACTERS", 2000)
    run(place, tmp_path, workers=workers)
    assert contents(tmp_path) == expected


def test_order_of_the_source_does_not_matter(place: Path, expected: dict, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    lines = [line for name in "ba" for line in (place / "source" / f"{name}.jsonl").read_text().splitlines()]
    (tmp_path / "source" / "z.jsonl").write_text("\n".join(lines[::-1]))
    shutil.copytree(place / "tokenizer", tmp_path / "tokenizer")
    run(tmp_path, tmp_path / "out")
    found = contents(tmp_path / "out")
    assert {name: data for name, data in found.items() if name.endswith("tar")} == {
        name: data for name, data in expected.items() if name.endswith("tar")
    }
    assert Manifest.load(tmp_path / "out").fingerprint == Manifest.load(place / "expected").fingerprint


def test_parts_and_merge_equal_one_run(
    place: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    assert passes.prepare(options(place, tmp_path), part=(1, 3)) is None
    with pytest.raises(UserError, match="not encoded yet"):
        passes.prepare(options(place, tmp_path), merge=True)
    for index in (2, 0):
        passes.prepare(options(place, tmp_path), part=(index, 3))
    passes.prepare(options(place, tmp_path), merge=True)
    assert contents(tmp_path) == expected


def test_a_tokenizer_of_whole_words(place: Path, tmp_path: Path) -> None:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*WORDS, "?", "."])}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    manifest = passes.prepare(
        replace(options(place, tmp_path / "out", workers=2), tokenizer=str(tmp_path / "tokenizer.json"))
    )
    assert manifest is not None
    rows = TokenRows(str(tmp_path / "out"), manifest, "train").read(Span(0, 0, 0, 1))[0]
    assert set(np.unique(rows)) <= set(range(len(WORDS) + 2))
    assert len(np.unique(rows)) > 10


def test_a_finished_folder_stays_as_it_is(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(place, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run(place, tmp_path)
    assert "already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    with pytest.raises(UserError, match="--seed was 0, now 1"):
        run(place, tmp_path, seed=1)
    with pytest.raises(UserError, match="--shards was 48, now 4"):
        run(place, tmp_path, shards=4)
    manifest = passes.prepare(options(place, tmp_path, shards=4), fresh=True)
    assert manifest is not None
    assert len(list(tmp_path.glob("train-*.tar"))) == 4


def test_a_finished_folder_knows_its_source_from_another_of_the_same_name(place: Path, tmp_path: Path) -> None:
    for name, count in (("a", 60), ("b", 61)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"text": text, "title": text}) + "\n" for text in TEXTS[:count]]
        (tmp_path / name / "train.jsonl").write_text("".join(lines))
    first = replace(options(place, tmp_path / "out"), source=str(tmp_path / "a" / "train.jsonl"))
    manifest = passes.prepare(first)
    assert passes.prepare(first) == manifest
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    assert passes.prepare(replace(first, source=str(tmp_path / "copied" / "train.jsonl"))) == manifest
    with pytest.raises(UserError, match=r"--source .*names and sizes.* was .*, now"):
        passes.prepare(replace(first, source=str(tmp_path / "b" / "train.jsonl")))
    with pytest.raises(UserError, match="--text-field was 'text', now 'title'"):
        passes.prepare(replace(first, text_field="title"))
    # A folder of an earlier version records neither.
    path = tmp_path / "out" / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["text_field"], fields["source_files"]
    path.write_text(json.dumps(fields))
    earlier = passes.prepare(replace(first, text_field="title"))
    assert earlier is not None
    assert manifest is not None
    assert earlier.fingerprint == manifest.fingerprint


def test_changed_arguments_and_sources_are_refused_on_resume(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "source", tmp_path / "source")
    shutil.copytree(place / "tokenizer", tmp_path / "tokenizer")
    passes.prepare(options(tmp_path, tmp_path / "out"), part=(0, 2))
    with pytest.raises(UserError, match="--row-tokens was 256, now 512"):
        run(tmp_path, tmp_path / "out", row_tokens=512)
    passes.prepare(options(tmp_path, tmp_path / "out"), part=(1, 2))
    with (tmp_path / "source" / "b.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match=r"changed since.*b\.jsonl.*--fresh"):
        run(tmp_path, tmp_path / "out")


def test_the_same_folder_takes_the_remedy_of_a_mistake(place: Path, expected: dict, tmp_path: Path) -> None:
    """Nothing is finished of what was wrong: another field, a file that was mended."""
    source = Path(shutil.copytree(place / "source", tmp_path / "source"))
    shutil.copytree(place / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(UserError, match="--text-field"):
        run(tmp_path, tmp_path / "out", text_field="body")
    sound = (source / "b.jsonl").read_bytes()
    (source / "b.jsonl").write_bytes(sound[:-40])
    with pytest.raises(UserError, match=r"b\.jsonl"):
        run(tmp_path, tmp_path / "out")
    (source / "b.jsonl").write_bytes(sound)
    run(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


def test_another_machines_part_is_not_discarded(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--text-field"):
        passes.prepare(options(place, tmp_path / "out", text_field="body"), part=(0, 2))
    with pytest.raises(UserError, match="--text-field was 'body', now 'text'"):
        passes.prepare(options(place, tmp_path / "out"), part=(0, 2))


def command(place: Path, output: Path) -> list[str]:
    return [
        sys.executable, "-c",
        "import sys; from data_pipeline.prepare import __main__ as prepare; from data_pipeline.text import sources; "
        "sources.UNIT_BYTES = 8000; sys.exit(prepare.main(sys.argv[1:]))",
        "--source", str(place / "source"), "--tokenizer", str(place / "tokenizer"), "--output", str(output),
        "--row-tokens", "256", "--max-document-length", "64", "--min-document-length", "5",
        "--heldout-fraction", "0.05", "--workers", "2",
    ]  # fmt: skip


def test_kill_at_any_moment_then_the_same_bytes(place: Path, expected: dict, tmp_path: Path) -> None:
    """kill -9 of the command, as a user starts it, at a few random moments (test_kills.py has more of them); the last run
    ends with the bytes of an undisturbed one."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    rng = np.random.default_rng(4)
    for _ in range(4):
        process = subprocess.Popen(command(place, tmp_path), env=environment, stderr=subprocess.DEVNULL)
        time.sleep(float(rng.uniform(0.3, 5)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(place, tmp_path), env=environment, check=True, stderr=subprocess.DEVNULL)
    assert contents(tmp_path) == expected


def test_finished_work_is_not_repeated(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 300_000)
    passes.prepare(options(place, tmp_path), part=(0, 2))
    for name in (".manifest.json.abc.tmp", ".train-00000.tar.abc.tmp"):  # of a killed run
        (tmp_path / name).write_text("half")
    encoded: list[int] = []
    original = passes.encode_bundle
    monkeypatch.setattr(
        passes, "encode_bundle", lambda task, report: encoded.append(task.index) or original(task, report)
    )
    run(place, tmp_path)
    assert encoded == list(range(1, len(sources.open_source(str(place / "source")).bundles), 2))
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_full_disk_is_named_and_loses_nothing_finished(
    place: Path, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, written = os.fsync, []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) > 30:
            raise OSError(28, "No space left on device")
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
            run(place, tmp_path)
    assert list((tmp_path / ".prepare" / "bundles").glob("*.json"))
    assert not list(tmp_path.rglob("*.tmp"))
    run(place, tmp_path)
    assert contents(tmp_path) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_small_disk_that_is_really_full(
    place: Path, expected: dict, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    with pytest.raises(UserError, match=r"No space left on device.*run the same command again"):
        run(place, small_disk)
    finished = {path: path.read_bytes() for path in (small_disk / ".prepare").rglob("*") if path.is_file()}
    assert any(path.suffix == ".json" and path.parent.name == "bundles" for path in finished)
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    encoded: list[int] = []
    original = passes.encode_bundle
    monkeypatch.setattr(
        passes, "encode_bundle", lambda task, report: encoded.append(task.index) or original(task, report)
    )
    run(place, small_disk)
    done = {int(path.stem) for path in finished if path.suffix == ".json" and path.parent.name == "bundles"}
    assert not done & set(encoded)
    assert contents(small_disk) == expected


def test_the_loader_reads_what_prepare_wrote(place: Path, expected: dict) -> None:
    split = Split(kind="none")
    loader = TrainLoader(
        place / "expected", None, seed=0, streams=4, rows_per_step=8, micro_batch_rows=4, split=split, workers=0
    )
    tokenizer = load_tokenizer(place / "expected" / "tokenizer")
    [batch, _] = loader.next_step()
    place_, ends = 0, 0
    for length, role in zip(batch.segment_lengths, batch.segment_roles):
        tokens = batch.tokens_T[place_ : place_ + length].tolist()
        assert (set(tokens) == {0}) == (role == FILLER)
        ends += tokenizer.info.eos_id in tokens
        assert tokenizer.info.eos_id not in tokens[:-1]
        place_ += length
    assert ends > 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"row_tokens": 32}, "--row-tokens 32"),
        ({"min_document_length": 40}, "twice --min-document-length"),
        ({"heldout_fraction": 1.0}, "--heldout-fraction 1.0"),
        ({"shards": 0}, "--shards 0"),
        ({"shards": 100_001}, "--shards 100001: expected 1 to 100000"),
        ({"workers": 0}, "--workers 0"),
        ({"text_field": "body"}, "--text-field"),
        ({"shards": 100_000}, "too few for 100000"),
    ],
)
def test_impossible_arguments_are_refused(place: Path, tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(place, tmp_path, **changes)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_documents_and_files_add_up(place: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture) -> None:
    """In the manifest and in what is printed, whatever reads them; no text and empty text are two counts."""
    texts = [*TEXTS[:100], TEXTS[0], "", "  \n", "a", None]
    folder = tmp_path / "source"
    (folder / ".hidden").mkdir(parents=True)
    (folder / ".hidden" / "a.jsonl").touch()
    (folder / "b.bin").touch()
    if form == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet")
    elif form == "csv":
        with (folder / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text"], *([text] for text in texts if text is not None)])
    else:
        records = [{"text": text} for text in texts]
        lines = json.dumps(records) if form == "json" else "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"a.{form}").write_text(lines)
    flags = [
        "--source",
        str(folder),
        "--tokenizer",
        str(place / "tokenizer"),
        "--output",
        str(tmp_path / "out"),
        "--dedupe",
    ]
    assert main([*flags, "--min-document-length", "5", "--heldout-fraction", "0.1", "--workers", "1"]) == 0
    null = int(form != "csv")  # which has no null
    counts = Manifest.load(tmp_path / "out").statistics
    assert (counts["documents"], counts["without_text"], counts["empty"]) == (104 + null, null, 2)
    assert (counts["too_short"], counts["duplicates"]) == (1, 1)
    assert counts["train_documents"] + counts["heldout_documents"] == 100
    assert counts["heldout_documents"] > 0
    left = {name: count for name, count in counts.items() if name.startswith("files_left_out")}
    assert left == {"files_left_out_hidden": 1, "files_left_out_no_reader": 1}
    assert counts["files_found"] == counts["files_read"] + sum(left.values()) == 3
    printed = capsys.readouterr().out
    assert f"3 files, reads 1 .{form}; leaves out 1 .hidden (hidden), 1 .bin (no reader)\n" in printed
    assert (
        f"{104 + null} documents: {counts['train_documents']} train, {counts['heldout_documents']} held out, {null} without text, "
        "2 empty, 1 shorter than 5 tokens, 1 duplicates\n"
    ) in printed


def test_many_small_files_cost_what_one_costs(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same chunks, openings of chunks and calls of the tokenizer, by bytes; and the same shards."""
    (tmp_path / "many").mkdir()
    (tmp_path / "one").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "many" / f"{number:05d}.txt").write_text(text)
    (tmp_path / "one" / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    monkeypatch.setattr(sources, "UNIT_BYTES", 200_000)
    monkeypatch.setattr(assemble, "GROUP_ROWS", 16)
    counts: dict[str, Counter] = {}
    for name in ("one", "many"):
        counts[name] = Counter()
        with monkeypatch.context() as patch:
            counted(patch, spill.Chunk, "__init__", counts[name])
            counted(patch, encode, "_encode", counts[name])
            counted(patch, encode, "write_text", counts[name])
            manifest = passes.prepare(replace(options(place, tmp_path / f"out-{name}"), source=str(tmp_path / name)))
        assert manifest is not None
        counts[name]["train"] = int(manifest.fingerprint, 16)
    assert counts["many"].pop("train") == counts["one"].pop("train")
    assert counts["one"]["__init__"] > 20
    for name, count in counts["one"].items():  # where files end, bundles are not as even
        assert counts["many"][name] <= 1.1 * count, name


def counted(patch: pytest.MonkeyPatch, place: object, name: str, counts: Counter) -> None:
    original = getattr(place, name)

    def call(*arguments: object, **keywords: object) -> object:
        counts[name] += 1
        return original(*arguments, **keywords)

    patch.setattr(place, name, call)


def test_a_source_that_holds_its_output_is_continued(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]))
    inside = replace(options(place, tmp_path / "out"), source=str(tmp_path))
    manifest = passes.prepare(inside)
    assert passes.prepare(inside) == manifest
    assert "reads 1 .jsonl; leaves out" in capsys.readouterr().out


def test_a_split_may_be_chosen(place: Path, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 60)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:count])
        (tmp_path / f"{name}.jsonl").write_text(lines)
    flags = ["--source", str(tmp_path), "--tokenizer", str(place / "tokenizer"), "--workers", "1", "--output"]
    assert main([*flags, str(tmp_path / "asked")]) == 2
    for split, count in (("train", 20), ("test", 60), ("all", 80)):
        assert main([*flags, str(tmp_path / split), "--split", split]) == 0
        manifest = Manifest.load(tmp_path / split)
        assert (manifest.source, manifest.statistics["documents"]) == (f"{tmp_path.name}#{split}", count)
    assert main([*flags, str(tmp_path / "all"), "--split", "test"]) == 2


def test_a_tokenizer_without_an_end_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*WORDS, "?", "."])}, unk_token="?"))
    backend.pre_tokenizer = Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(TEXTS[0] * 20)
    flags = ["--source", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer.json"), "--workers", "1"]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "warning: tokenizer" in said.err
    assert "has no end-of-text token" in said.err
    assert "without document ends" in said.out


@pytest.mark.parametrize(
    ("name", "content", "workers", "cause"),
    [("a.parquet", b"PAR1 no", "1", "ArrowInvalid: "), ("b.jsonl", b'{"text": "a"}\n{', "2", "JSONDecodeError: ")],
)
def test_a_traceback_is_shown_on_request_from_any_process(
    place: Path, tmp_path: Path, name: str, content: bytes, workers: str, cause: str
) -> None:
    """The first fails in the process that was started, the second in one of its workers."""
    (tmp_path / name).write_bytes(content)
    flags = ["--source", str(tmp_path / name), "--tokenizer", str(place / "tokenizer"), "--workers", workers]
    command = [sys.executable, "-m", "data_pipeline.prepare", *flags, "--output", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "TEXTLDM_TRACEBACK": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 2
    before, line = process.stderr.rstrip("\n").rsplit("\n", 1)
    assert line.startswith(f"error: source {tmp_path / name}")
    assert "Traceback" in before
    assert cause in before


def test_little_and_no_text(place: Path, tmp_path: Path) -> None:
    arguments = ["--tokenizer", str(place / "tokenizer"), "--output", str(tmp_path / "out"), "--workers", "1"]
    (tmp_path / "one.txt").write_text("a red cat sees the house and the dog")
    (tmp_path / "none.txt").write_text(" ")
    assert main(["--source", str(tmp_path / "none.txt"), *arguments]) == 2
    assert main(["--source", str(tmp_path / "one.txt"), *arguments, "--fresh"]) == 0
    assert [len(shards) for shards in Manifest.load(tmp_path / "out").splits.values()] == [1, 0]


def test_inspect_and_verify(place: Path, expected: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(place / "expected", tmp_path / "copy")
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    for text in ("fingerprint", "fill 99", "window length", "row 0 of train-00000.tar", "likes", "<|endoftext|>"):
        assert text in output
    assert main(["verify", str(folder)]) == 0
    path = folder / "train-00007.tar"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    assert main(["verify", str(folder)]) == 2
    assert "train-00007.tar: SHA-256" in capsys.readouterr().err


def test_urls_are_no_outputs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    start = ["--source", str(place / "source"), "--tokenizer", str(place / "tokenizer"), "--output"]
    for arguments in ([*start, "s3://bucket/data"], ["verify", "https://host/data"], ["inspect", "https://host/data"]):
        assert main(arguments) == 2
        assert f"{arguments[-1]} is a URL, expected a local folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_real_text_fills_rows(shared: Path, tmp_path: Path) -> None:
    for name, tokenizer, row_tokens in (("openwebtext", "qwen", 4096), ("tinystories", "gpt2", 1024)):
        lines = (shared / "corpora" / f"{name}.jsonl").read_text().splitlines()
        (tmp_path / "text.jsonl").write_text("\n".join(lines[: len(lines) // 2]))
        manifest = passes.prepare(
            PrepareOptions(
                str(tmp_path / "text.jsonl"),
                str(shared / "tokenizers" / tokenizer),
                tmp_path / name,
                row_tokens=row_tokens,
            )
        )
        assert manifest is not None
        assert manifest.fill() >= 0.99
