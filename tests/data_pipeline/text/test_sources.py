"""A source is opened whatever it is, or refused by name; its units are bundled by bytes."""

import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text import sources
from data_pipeline.text.sources import files_hash, first_documents, open_source, source_name
from tests.data_pipeline.text.texts import TEXTS, write_jsonl


def test_a_small_file_is_work_for_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    monkeypatch.setattr(sources, "UNIT_BYTES", path.stat().st_size + 1)
    source = open_source(str(path))
    assert len(source.bundles) in (16, 17)
    assert list(source) == TEXTS


@pytest.mark.parametrize("num_files", [1, 10, 250])
@pytest.mark.parametrize("ending", ["jsonl", "txt", "json", "jsonl.gz"])
def test_bundles_go_by_bytes_not_by_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int, ending: str
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 4000)
    for number in range(num_files):
        texts = TEXTS[number::num_files]
        if ending == "txt":
            (tmp_path / f"{number:04d}.txt").write_text("\f".join(texts))
        else:
            write_jsonl(tmp_path / f"{number:04d}.{ending}", texts)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    unit_bytes = min(4000, max(4000 // 16, total // 16))
    source = open_source(str(tmp_path))
    sizes = [sum(unit.num_bytes for unit in bundle) for bundle in source.bundles]
    assert all(first + second > unit_bytes for first, second in pairwise(sizes))
    assert all(size <= unit_bytes for bundle, size in zip(source.bundles, sizes) if len(bundle) > 1)
    assert len({unit.location for unit in source.units()}) == num_files
    assert sorted(text.strip() for text in source) == sorted(text.strip() for text in TEXTS)


def test_the_number_of_bundles_is_that_of_one_file_of_the_same_bytes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one" / "all.jsonl", TEXTS * 40)
    for number in range(250):
        write_jsonl(tmp_path / "many" / f"{number}.jsonl", TEXTS[number::250] * 40)
    one, many = (len(open_source(str(tmp_path / name)).bundles) for name in ("one", "many"))
    assert one > 3
    assert many <= one + 1


def test_statistics_of_a_file_and_of_a_folder(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    assert open_source(str(path)).statistics == {"files_found": 1, "files_read": 1}
    (tmp_path / "b.bin").touch()
    assert open_source(str(tmp_path)).statistics == {"files_found": 2, "files_read": 1, "files_left_out_no_reader": 1}


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.bin", b"x", r"a\.bin: unknown kind of file; expected \.jsonl"),
        ("a.tar", b"x", r"a\.tar: unknown kind of file; archives are not read: unpack them.*`tar -xf a\.tar`"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", r"a\.txt: a Git LFS pointer .git lfs pull. instead"),
        ("a.parquet", b"/annex/objects/SHA256E-s1--0.parquet\n", r"a\.parquet: a git-annex pointer"),
    ],
)
def test_single_files_that_cannot_be_read_are_refused(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named):
        open_source(str(tmp_path / name))


def test_links_and_pipes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "b.jsonl").symlink_to(path)
    assert list(open_source(str(tmp_path / "b.jsonl"))) == TEXTS[:3]
    (tmp_path / "c.jsonl").symlink_to("gone")
    with pytest.raises(UserError, match="a link to gone, which does not exist"):
        open_source(str(tmp_path / "c.jsonl"))
    os.mkfifo(tmp_path / "d.jsonl")
    with pytest.raises(UserError, match="a pipe or device, which cannot be read twice"):
        open_source(str(tmp_path / "d.jsonl"))


def test_a_split_of_a_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--split train: .* is one part"):
        open_source(str(write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])), split="train")


def test_names_hold_no_folders_of_this_machine(tmp_path: Path) -> None:
    assert source_name(str(write_jsonl(tmp_path / "a.jsonl"))) == "a.jsonl"
    assert source_name("owner/name@main") == "owner/name@main"
    assert source_name("owner/name", "test") == "owner/name#test"
    (tmp_path / "\udcff").mkdir()
    assert source_name(str(tmp_path / "\udcff")) == "\ufffd"


def test_the_hash_is_of_names_and_sizes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a" / "x.jsonl", TEXTS[:3])
    write_jsonl(tmp_path / "b" / "x.jsonl", TEXTS[:3])
    write_jsonl(tmp_path / "c" / "x.jsonl", TEXTS[:4])
    first, same, other = (files_hash(str(tmp_path / n), open_source(str(tmp_path / n)).units()) for n in "abc")
    assert first == same != other
    assert json.dumps(first)
    assert files_hash("owner/name", []) is None


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250, 299, 300, 301, 10**6])
def test_the_first_documents_are_those_of_the_whole_and_no_more_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", [f"document {part} {number}" for number in range(100)])
    whole = open_source(str(tmp_path))
    first = first_documents(whole, count)
    assert list(first) == list(whole)[:count]
    if count <= 300:
        assert list(replace(first, bundles=first.bundles[:-1], last=None)) == list(first)[: -first.last]


def test_attack_10a_a_sources_name_holds_no_password() -> None:
    """It goes into the manifest, the card and the log."""
    assert source_name("https://me:pass@host/a.jsonl?token=abc", "test") == "https://***@host/a.jsonl?token=***#test"
