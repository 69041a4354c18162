"""Texts, and how the tests of sources and readers write and read them."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from data_pipeline.text.readers.registry import read_unit, reader_of
from data_pipeline.text.sources import open_source

TEXTS = [f"Document number {i}. " + "Wörter und Zeichen — " * (i % 7) for i in range(1000)]


def compress(data: bytes, ending: str) -> bytes:
    """The data as files of that ending hold it; of Zstandard in two frames, as parallel compressors write them."""
    if ending == "zst":
        half = len(data) // 2
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[ending](data)


def write_jsonl(path: Path, texts: Iterable[str] = TEXTS, **more: Any) -> Path:
    """One record a line; compressed if the name says so."""
    data = b"".join(json.dumps({"text": text, **more}, ensure_ascii=False).encode() + b"\n" for text in texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = path.suffix[1:]
    path.write_bytes(compress(data, ending) if ending in ("gz", "zst", "bz2", "xz") else data)
    return path


def by_unit(path: Path, unit_bytes: int, text_field: str = "text") -> list[list[str | None]]:
    """The documents of each unit of a file that is read in units of so many bytes."""
    reader = reader_of(str(path))
    assert reader is not None
    return [list(read_unit(unit, text_field)) for unit in reader.units(str(path), unit_bytes)]


def documents(path: Path | str, text_field: str = "text") -> list[str | None]:
    """All documents of a source, None where a text is null."""
    source = open_source(str(path), text_field)
    return [text for unit in source.units() for text in read_unit(unit, text_field)]
