"""Compressed files are read whatever wrote them; what is cut short, damaged or of another kind than its name says is refused."""

import bz2
import json
import lzma
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers import streams
from data_pipeline.text.readers.streams import open_plain
from tests.data_pipeline.text.texts import TEXTS, compress, documents, write_jsonl

LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def raw_zstd(data: bytes, window_log: int) -> bytes:
    """A frame of uncompressed blocks that asks for a window of 2^window_log bytes, as `zstd --long` writes large files."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(window_log - 10) << 3])
    pieces = [data[start : start + 60_000] for start in range(0, len(data), 60_000)]
    for number, piece in enumerate(pieces):
        frame += struct.pack("<I", (len(piece) << 3) | (number + 1 == len(pieces)))[:3] + piece
    return frame


@pytest.mark.parametrize("window_log", [20, 27, 28, 30, 31])
def test_long_windows_are_read(tmp_path: Path, window_log: int) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(raw_zstd(LINES, window_log))
    assert documents(tmp_path / "a.jsonl.zst") == TEXTS


def test_frames_of_metadata_are_passed_over(tmp_path: Path) -> None:
    """As pzstd and seekable compressors write them, in front, between and behind."""
    skippable = b"\x55\x2a\x4d\x18" + struct.pack("<I", 5) + b"meta!"
    half = len(LINES) // 2
    data = skippable + zstandard.compress(LINES[:half]) + skippable + zstandard.compress(LINES[half:]) + skippable
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert documents(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
@pytest.mark.parametrize("kept", [0, 11, 0.5, -40])
def test_what_was_cut_short_is_refused(tmp_path: Path, ending: str, kept: float) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl.{ending}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{ending}: (cannot be read|holds no)") as raised:
        documents(path)
    assert "\n" not in str(raised.value)
    assert "fetch it again" in str(raised.value)


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_damage_is_refused_in_one_line(tmp_path: Path, ending: str) -> None:
    path = write_jsonl(tmp_path / f"a.jsonl.{ending}")
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 3, 2 * len(data) // 3):
        data[place] ^= 0x55
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.jsonl\.{ending}") as raised:
        documents(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl.gz", LINES, "holds no gzip data"),
        ("a.jsonl.zst", compress(LINES, "gz"), "holds gzip data"),
        ("a.jsonl", compress(LINES, "gz"), "holds gzip data"),
        ("a.txt", compress(LINES, "zst"), "holds Zstandard data"),
        ("a.json", compress(LINES, "bz2"), "holds bzip2 data"),
        ("a.csv.gz", compress(LINES, "xz"), "holds xz data"),
    ],
)
def test_a_name_that_says_otherwise_is_told_as_such(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {named}, against its name.*ending of what it is"):
        documents(tmp_path / name)


def test_text_that_begins_like_an_archive_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("BZh9 is how they begin")
    with open_plain(str(tmp_path / "a.txt")) as file:
        assert file.read() == b"BZh9 is how they begin"


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "xz"])
def test_of_several_frames_none_is_lost(tmp_path: Path, ending: str) -> None:
    """As parallel compressors and `cat a.gz b.gz` write them; a later one whose beginning is damaged is refused, not left out."""
    half = len(LINES) // 2
    first, second = compress(LINES[:half], ending), compress(LINES[half:], ending)
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(first + second)
    assert documents(path) == TEXTS
    path.write_bytes(first + second + bytes(512))  # padding to a block of a tape
    assert documents(path) == TEXTS
    path.write_bytes(first + b"junk" + second[4:])
    with pytest.raises(UserError, match=rf"a\.jsonl\.{ending}: cannot be read"):
        documents(path)


def bomb(ending: str, plain: int) -> bytes:
    """A small file of one line of so many bytes."""
    head, piece = b'{"text": "', b" " * (1 << 20)
    if ending == "zst":
        made = zstandard.ZstdCompressor(level=3).compressobj()
    else:
        made = {"gz": lambda: zlib.compressobj(9, wbits=31), "bz2": bz2.BZ2Compressor, "xz": lzma.LZMACompressor}[
            ending
        ]()
    return made.compress(head) + b"".join(made.compress(piece) for _ in range(plain >> 20)) + made.flush()


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("gz", "jsonl"), ("zst", "jsonl"), ("bz2", "txt"), ("xz", "json"), ("gz", "csv"), ("zst", "txt")],
)
def test_attacks_8a_8b_a_bomb_is_named_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, kind: str
) -> None:
    for module, names in {
        "streams": ("LONGEST_LINE",), "csv_table": ("LONGEST_LINE",), "json_values": ("LONGEST_LINE",), "text": ("LONGEST_DOCUMENT",),
    }.items():  # fmt: skip
        for name in names:
            monkeypatch.setattr(f"data_pipeline.text.readers.{module}.{name}", 1 << 20)
    monkeypatch.setattr(streams.lines_of, "__defaults__", (1 << 20,))
    path = tmp_path / f"a.{kind}.{ending}"
    path.write_bytes(bomb(ending, 32 << 20))
    assert path.stat().st_size < 1 << 16
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"a\.{kind}\.{ending}: a line or document of more than 1 MiB; divide it"):
        documents(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (80 if ending == "zst" else 16) << 20  # a few times what is unpacked at once, and not the 32 MiB


def test_attack_8a_little_is_unpacked_at_once(tmp_path: Path) -> None:
    """A quarter of a MiB of Zstandard may stand for gigabytes, which one call would unpack."""
    (tmp_path / "a.zst").write_bytes(bomb("zst", 256 << 20))
    with open_plain(str(tmp_path / "a.zst")) as file:
        tracemalloc.start()
        assert len(file.read(1 << 16)) == 1 << 16
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 160 << 20


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"text":' * 100_000, b'{"text": "a", "b": ' + b"[" * 100_000])
def test_attack_8c_nested_lines_are_named(tmp_path: Path, name: str, line: bytes) -> None:
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' * (name == "a.jsonl") + line + b"\n")
    with pytest.raises(UserError, match=rf"source .*{name}"):
        documents(tmp_path / name)


def test_documents_of_text_and_lines_of_csv_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many short lines, too, may be one document or one cell."""
    monkeypatch.setattr("data_pipeline.text.readers.text.LONGEST_DOCUMENT", 100)
    (tmp_path / "a.txt").write_text("short line\n" * 8 + "<|endoftext|>\n" + "short line\n" * 8)
    assert len(documents(tmp_path / "a.txt")) == 2
    (tmp_path / "a.txt").write_text("short line\n" * 10)
    with pytest.raises(UserError, match=r"a\.txt: a line or document of more than"):
        documents(tmp_path / "a.txt")
    monkeypatch.setattr("data_pipeline.text.readers.csv_table.LONGEST_LINE", 100)
    (tmp_path / "a.csv").write_text('text\n"' + "short line\n" * 10 + '"\n')
    with pytest.raises(UserError, match=r"a\.csv: cannot be read .*field larger than field limit \(100\)"):
        documents(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
@pytest.mark.parametrize(
    ("start", "what"), [(b"PK\x03\x04", "a ZIP archive"), (b"%PDF-1.7", "a PDF"), (b"PAR1", "a Parquet table")]
)
def test_what_is_no_text_at_all_is_called_by_its_name(tmp_path: Path, name: str, start: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(start + bytes(range(200)))
    with pytest.raises(UserError, match=f"{name}: holds {what}, against its name; unpack or convert it"):
        documents(tmp_path / name)
