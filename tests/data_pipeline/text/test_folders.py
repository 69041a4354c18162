"""Of a folder every entry is read, left out for a told reason, or refused; and the counts add up."""

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.text.folders import list_folder
from data_pipeline.text.sources import open_source
from tests.data_pipeline.text.texts import documents, write_jsonl


def write(folder: Path, *names: str) -> None:
    """Files of one document, which is the file's name; all as long as one another, about."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if re.search(r"\.jsonl?(\.(gz|zst|xz))?$", name, re.IGNORECASE):
            write_jsonl(folder / name, [name], more=" " * (200 - len(name)))
        else:
            (folder / name).write_text(f"{name}{' ' * (220 - len(name))}")


def num_entries(folder: Path) -> int:
    """Files and links below a folder, links not followed."""
    paths = [Path(place, name) for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    return sum(path.is_symlink() or not path.is_dir() for path in paths)


CASES: dict[str, tuple[list[str], list[str], str]] = {
    # what lies there, what is read, what is said of the rest
    "one kind": (["a.jsonl", "x/b.jsonl"], ["a.jsonl", "x/b.jsonl"], ""),
    "several kinds": (["a.jsonl", "b.txt", "c.jsonl.gz"], ["a.jsonl", "b.txt", "c.jsonl.gz"], ""),
    "capitals": (["A.JSONL", "B.TXT"], ["A.JSONL", "B.TXT"], ""),
    "unknown kinds": (["a.txt", "b.pdf", "c.pdf", "README"], ["a.txt"], "2 .pdf, 1 without ending (no reader)"),
    "half a download": (["a.txt", "b.txt.part", "c.txt~"], ["a.txt"], "1 .part, 1 without ending (no reader)"),
    "hidden files": (["a.txt", ".b.txt", "._a.txt"], ["a.txt"], "1 ._a.txt, 1 .b.txt (hidden)"),
    "hidden folders": (
        ["a.txt", ".ipynb_checkpoints/a.txt", ".Trash-0/files/x.txt", ".Trash-0/info", ".git/objects/00/11"],
        ["a.txt"],
        "2 .Trash-0, 1 .git, 1 .ipynb_checkpoints (hidden)",
    ),
    "hidden below": (["x/y/a.txt", "x/y/.cache/b.txt"], ["x/y/a.txt"], "1 .cache (hidden)"),
    "of other systems": (
        ["a.txt", "__MACOSX/a.txt", "$RECYCLE.BIN/b.txt", "lost+found/1.txt"],
        ["a.txt"],
        "1 $RECYCLE.BIN, 1 __MACOSX, 1 lost+found (hidden)",
    ),
    "of Spark and of network storage": (
        ["a.txt", "_SUCCESS", "_temporary/0/a.txt", "@eaDir/a.txt", "#recycle/a.txt", "x/_delta_log/0.json"],
        ["a.txt"],
        "1 #recycle, 1 @eaDir, 1 _delta_log, 1 _temporary (hidden), 1 without ending (no reader)",
    ),
    "another compression": (["a.txt", "b.txt", "c.txt.lz4"], ["a.txt", "b.txt"], "1 .txt.lz4 (packed)"),
    "descriptions": (["a.jsonl", "b.jsonl", "info.json", "c.csv"], ["a.jsonl", "b.jsonl"], "1 .csv, 1 .json (beside text)"),
    "only what else describes": (["a.json", "b.json"], ["a.json", "b.json"], ""),
    "compressed beside plain": (["a.jsonl", "a.jsonl.gz", "b.jsonl.zst"], ["a.jsonl", "b.jsonl.zst"], "1 .jsonl.gz (read already)"),
    "archives": (["a.txt", "b.txt", "c.tar", "d.zip"], ["a.txt", "b.txt"], "1 .tar, 1 .zip (packed)"),
    "splits in names": (
        ["x/train-0.jsonl", "x/validation-0.jsonl", "x/test-0.jsonl", "x/train-1.jsonl"],
        ["x/train-0.jsonl", "x/train-1.jsonl"],
        "2 .jsonl (another split)",
    ),
    "splits in folders": (
        ["train/0.jsonl", "train/1.jsonl", "x.jsonl", "test/0.jsonl"],
        ["train/0.jsonl", "train/1.jsonl"],
        "2 .jsonl (another split)",
    ),
    "the last name counts": (["test/train.jsonl", "test/test.jsonl"], ["test/train.jsonl"], "1 .jsonl (another split)"),
    "no splits": (["0.jsonl", "latest.jsonl", "trains.jsonl"], ["0.jsonl", "latest.jsonl", "trains.jsonl"], ""),
    "train alone": (["train-0.jsonl", "x.jsonl"], ["train-0.jsonl", "x.jsonl"], ""),
    "test alone": (["1.jsonl", "test/0.jsonl"], ["1.jsonl", "test/0.jsonl"], ""),
    "titles": (
        ["How to Train Your Dragon.txt", "The Driving Test.txt", "Dev Patel.txt", *(f"Tale {i}.txt" for i in range(9))],
        ["Dev Patel.txt", "How to Train Your Dragon.txt", *(f"Tale {i}.txt" for i in range(9)), "The Driving Test.txt"],
        "",
    ),
    "titles as in addresses": (
        ["the-train-to-riga.txt", "a_test_of_will.txt", "eval.txt", *(f"tale-{i}.txt" for i in range(20))],
        ["a_test_of_will.txt", "eval.txt", *sorted(f"tale-{i}.txt" for i in range(20)), "the-train-to-riga.txt"],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_and_what_is_said(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    names, read, said = CASES[case]
    write(tmp_path, *names)
    assert documents(tmp_path) == read
    line = capsys.readouterr().out.rstrip("\n")
    assert (
        line.startswith(f"source {tmp_path}: {len(names)} files, reads {len(read)} ")
        or len({Path(n).suffix for n in read}) > 1
    )
    assert line.partition("; leaves out ")[2] == said
    counts = list_folder(str(tmp_path)).counts()
    assert counts["files_found"] == num_entries(tmp_path) == len(names)
    assert counts["files_read"] == len(read)
    assert sum(counts.values()) == 2 * counts["files_found"]


def linked_folder(folder: Path) -> list[str]:
    write(folder, "a.jsonl", "../big/b.jsonl")
    (folder / "more").symlink_to("../big")
    return ["a.jsonl", "../big/b.jsonl"]


def circle(folder: Path) -> list[str]:
    write(folder, "x/a.jsonl", "x/y/b.jsonl")
    (folder / "x" / "y" / "up").symlink_to(folder / "x")
    (folder / "x" / "here").symlink_to(".")
    (folder / "top").symlink_to("..")
    return ["x/a.jsonl", "x/y/b.jsonl"]


def two_that_lead_to_each_other(folder: Path) -> list[str]:
    write(folder, "../one/a.jsonl", "../two/b.jsonl")
    (folder / "../one/two").symlink_to("../two")
    (folder / "../two/one").symlink_to("../one")
    folder.mkdir(exist_ok=True)
    (folder / "start").symlink_to("../one")
    return ["../one/a.jsonl", "../two/b.jsonl"]


def second_names(folder: Path) -> list[str]:
    """A link comes before what it leads to, and still that is read."""
    write(folder, "b/2024.jsonl")
    (folder / "a").symlink_to("b")
    (folder / "latest.jsonl").symlink_to("b/2024.jsonl")
    (folder / "also.jsonl").hardlink_to(folder / "b" / "2024.jsonl")
    return ["b/2024.jsonl"]


def other_folder_of_blobs(folder: Path) -> list[str]:
    write(folder, "../blobs/0.jsonl", "../blobs/1.jsonl")
    for number in range(2):
        (folder / f"part-{number}.jsonl").symlink_to(f"../blobs/{number}.jsonl")
    return ["../blobs/0.jsonl", "../blobs/1.jsonl"]


def no_text_behind_it(folder: Path) -> list[str]:
    write(folder, "a.jsonl")
    (folder / "b").symlink_to("nowhere")
    (folder / ".#a.jsonl").symlink_to("user@host")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    socket.socket(socket.AF_UNIX).bind(str(folder / "s")) if len(str(folder)) < 90 else os.mkfifo(folder / "s")
    return ["a.jsonl"]


@pytest.mark.parametrize(
    "build",
    [linked_folder, circle, two_that_lead_to_each_other, second_names, other_folder_of_blobs, no_text_behind_it],
)
def test_links_are_followed_once(tmp_path: Path, build: Callable[[Path], list[str]]) -> None:
    folder = tmp_path / "corpus"
    read = build(folder)
    assert sorted(open_source(str(folder), follow_links=True)) == sorted(read)
    counts = list_folder(str(folder), follow_links=True).counts()
    assert sum(counts.values()) == 2 * counts["files_found"]
    assert counts["files_read"] == len(read)
    assert counts["files_found"] >= num_entries(folder) - sum(
        path.is_symlink() for path in folder.iterdir() if path.is_dir()
    )


def test_attack_15a_links_out_of_a_source_are_left_out_and_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder from elsewhere could bring a link to anything that its reader's user can read."""
    write(
        tmp_path,
        "theirs/a.jsonl",
        "theirs/b.jsonl",
        "theirs/x/c.jsonl",
        "mine/private.jsonl",
        "mine/more/private.jsonl",
    )
    (tmp_path / "theirs" / "also.jsonl").symlink_to("../mine/private.jsonl")
    (tmp_path / "theirs" / "more").symlink_to("../mine/more")
    (tmp_path / "theirs" / "all").symlink_to("/")
    (tmp_path / "theirs" / "again").symlink_to("x")
    looked_into = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (looked_into.append(os.path.realpath(path)), scandir(path))[1])
    listing = list_folder(str(tmp_path / "theirs"))
    assert [os.path.basename(file.path) for file in listing.taken] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert {path.removeprefix(f"{tmp_path}/theirs") for path in looked_into} == {"", "/x"}
    assert listing.counts()["files_left_out_out_of_the_folder"] == 3
    assert "1 .jsonl, 2 links to folders (out of the folder)" in listing.told_left().replace(
        "2 links to folders, 1 .jsonl", "1 .jsonl, 2 links to folders"
    )
    assert len(list_folder(str(tmp_path / "theirs" / "x"), follow_links=True).taken) == 1


@pytest.mark.parametrize("build", [linked_folder, other_folder_of_blobs, two_that_lead_to_each_other])
def test_attack_15a_a_source_of_links_to_elsewhere_is_the_users_to_allow(
    tmp_path: Path, build: Callable[[Path], list[str]]
) -> None:
    read = build(tmp_path / "corpus")
    if build is linked_folder:  # its own file is read, and the link told
        assert documents(tmp_path / "corpus") == ["a.jsonl"]
    else:
        with pytest.raises(UserError, match=r"links to elsewhere.*--follow-links"):
            list_folder(str(tmp_path / "corpus"))
    assert sorted(open_source(str(tmp_path / "corpus"), follow_links=True)) == sorted(read)


def test_a_snapshot_in_the_hubs_cache_is_made_of_links_within_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--x" / "snapshots" / "0123"
    write(snapshot, "../../blobs/0.jsonl", "../../blobs/1.jsonl", "../../../private.jsonl")
    for number in range(2):
        (snapshot / f"part-{number}.jsonl").symlink_to(f"../../blobs/{number}.jsonl")
    (snapshot / "part-2.jsonl").symlink_to("../../../private.jsonl")
    assert sorted(documents(snapshot)) == ["../../blobs/0.jsonl", "../../blobs/1.jsonl"]


def test_a_link_to_nothing_where_text_is_promised_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: is a link to gone\.jsonl"):
        list_folder(str(tmp_path))
    (tmp_path / "b.jsonl").unlink()
    os.mkfifo(tmp_path / "b.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl: is a pipe or device"):
        list_folder(str(tmp_path))


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jsonl", "x/b.jsonl")
    original = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("x"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(
        UserError, match=r"the folder .*/x cannot be listed .Permission denied.; give this user the right"
    ):
        list_folder(str(tmp_path))


def test_what_was_prepared_is_no_source(tmp_path: Path) -> None:
    """Neither the folder that is being written, of which some files are there, nor finished ones."""
    write(tmp_path, "a.jsonl", "out/train-00000.tar", "out/tokenizer/tokenizer.json")
    write(tmp_path, "earlier/train-00000.tar", "earlier/manifest.json", "earlier/tokenizer/tokenizer.json")
    listing = list_folder(str(tmp_path), output=str(tmp_path / "out"))
    assert listing.told() == "6 files, reads 1 .jsonl; leaves out 3 earlier, 2 out (prepared)"


MOSTLY_DROPPED = [
    ["train-0.jsonl", *(f"test-{i}.jsonl" for i in range(9))],
    ["How to Train Your Dragon.txt", "The Driving Test.txt", "Dev Patel.txt"],
    ["train/x.txt", *(f"validation/{i}.txt" for i in range(3))],
]


@pytest.mark.parametrize("names", MOSTLY_DROPPED)
def test_a_guess_of_splits_that_drops_most_is_asked_for(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, *names)
    with pytest.raises(UserError, match=r"train alone would leave out most of the text; choose with --split train"):
        list_folder(str(tmp_path))
    assert len(list_folder(str(tmp_path), "train").taken) == 1
    assert len(list_folder(str(tmp_path), "all").taken) == len(names)
    with pytest.raises(UserError, match=r"no file's name says that it is of split 'tests'.*--split all"):
        list_folder(str(tmp_path), "tests")


def test_any_split_may_be_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "dev.jsonl", "x.jsonl")
    for split in ("validation", "dev", "val"):
        assert [Path(file.path).name for file in list_folder(str(tmp_path), split).taken] == ["dev.jsonl"]
    assert len(list_folder(str(tmp_path), "all").taken) == 3


@pytest.mark.parametrize("ending", ["txt", "TXT"])
def test_a_licence_is_not_the_corpus(tmp_path: Path, ending: str) -> None:
    write(tmp_path, f"LICENSE.{ending}")
    for number in range(2):
        write_jsonl(tmp_path / f"c4-{number}.json", ["a text"] * 50)
    with pytest.raises(
        UserError, match=rf"holds 2 \.json, 1 \.{ending.lower()}, and either 1 \.{ending.lower()} or the others"
    ):
        list_folder(str(tmp_path))
    (tmp_path / f"LICENSE.{ending}").unlink()
    assert documents(tmp_path) == ["a text"] * 100


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ([], "found nothing"),
        (["a.bin", "b.bin"], r"found 2 \.bin .no reader"),
        ([".a.jsonl"], r"found 1 \.a\.jsonl .hidden"),
        (["openwebtext2.jsonl.zst.tar"], r"unpack them.*`tar -xf openwebtext2\.jsonl\.zst\.tar`"),
        (["urlsf_subset00-0_data.tar.xz"], r"unpack them.*`tar -xf urlsf_subset00-0_data\.tar\.xz`"),
        (
            ["a.jsonl", "b.jsonl.lz4", "c.jsonl.Z"],
            r"either 1 \.jsonl or the others.*compression \.lz4 is not read: decompress it",
        ),
        (["corpus.zip", "more.tgz"], r"1 \.tgz, 1 \.zip .packed.*unpack them.*`unzip corpus\.zip`"),
        (
            ["README.txt", "a.tar", "b.tar", "c.tar"],
            r"either 1 \.txt or the others.*unpack",
        ),
    ],
)
def test_folders_without_text_are_refused(tmp_path: Path, names: list[str], named: str) -> None:
    write(tmp_path, *names)
    with pytest.raises(UserError, match=named):
        list_folder(str(tmp_path))


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 123456789\n"


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.jsonl", "a.jsonl.zst", "a.json.gz", "a.parquet", "a.csv", "a.arrow", "a.tar", "x/y/deep.ndjson.xz"],
)
@pytest.mark.parametrize("beside", ["", "other.jsonl"])
def test_pointers_are_refused_in_every_format(tmp_path: Path, name: str, beside: str) -> None:
    write(tmp_path, *filter(None, [name, beside]))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(
        UserError, match=rf"1 of {1 + bool(beside)} files .*{Path(name).name}: a Git LFS pointer .git lfs pull"
    ):
        list_folder(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["träume", "a b", "x#1", "50%25off", "{0..3}", "b[1]", "q?*", "a:b", "a::b", "-x", "\udcff\n"]
)
@pytest.mark.parametrize("ending", ["jsonl", "json", "json.gz", "txt", "csv", "parquet", "arrow"])
def test_names_of_any_characters(tmp_path: Path, name: str, ending: str) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / f"web {name} [v2] {{a,b}} #1 100%"
    folder.mkdir()
    path = folder / f"{name}.{ending}"
    line = json.dumps({"text": "a text"})
    table = pyarrow.table({"text": ["a text"]})
    with path.open("wb") as file:
        if ending == "parquet":
            pyarrow.parquet.write_table(table, file)
        elif ending == "arrow":
            with pyarrow.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        else:
            plain = {"txt": "a text", "csv": "text\na text\n"}.get(ending, line).encode()
            file.write(gzip.compress(plain) if ending.endswith("gz") else plain)
    assert documents(folder) == documents(path) == ["a text"]
