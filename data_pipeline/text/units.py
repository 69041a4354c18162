"""One part of a source, and how each kind of part is read."""

import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline.core.errors import UserError
from data_pipeline.text import bible

_LINES_PER_BLOCK = 256
_DOCUMENT_END = b"<|endoftext|>"
HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<configuration>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)


@dataclass(frozen=True)
class Unit:
    """An independently readable part of a source: [start, stop) in bytes, row groups or rows, or part `start` of
    `stop`.
    """

    kind: str
    location: str
    start: int
    stop: int
    size: int = 0  # of the file or files, to notice that they changed between two runs

    def __str__(self) -> str:
        return f"{self.location}[{self.start}:{self.stop}]"


def read_unit(unit: Unit, text_field: str = "text") -> Iterator[str]:
    """Documents of one unit. Raises UserError naming the place of anything that cannot be read."""
    try:
        yield from _READERS[unit.kind](unit, text_field)
    except UserError:
        raise
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"source {unit.location}: cannot be read ({error}); repair or remove it") from None
    except Exception as error:  # pyarrow, zstandard and datasets have exceptions of their own for damaged files
        if type(error).__module__.split(".")[0] in (
            "pyarrow",
            "zstandard",
            "zstd",
            "zlib",
            "datasets",
            "huggingface_hub",
            "httpx",
        ):
            raise UserError(f"source {unit.location}: cannot be read ({error}); repair or remove it") from None
        raise


def _read_jsonl(unit: Unit, text_field: str) -> Iterator[str]:
    """Lines that begin within the unit's bytes."""
    with open(unit.location, "rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()  # up to the first line that begins here; the one before belongs to the previous unit
        place = file.tell()
        while place < unit.stop and (line := file.readline()):
            if line.strip():
                yield _parse(line, text_field, unit.location, f"byte {place}")
            place += len(line)


def _read_compressed(unit: Unit, text_field: str) -> Iterator[str]:
    """Every `stop`-th block of lines of a compressed file."""
    with _open_stream(Path(unit.location)) as file:
        for number, line in enumerate(file):
            if number // _LINES_PER_BLOCK % unit.stop == unit.start and line.strip():
                yield _parse(line, text_field, unit.location, f"line {number + 1}")


def _read_text(unit: Unit, text_field: str) -> Iterator[str]:
    """Documents behind a separator in a line that begins within the unit's bytes, and the file's first; one is held at a time."""
    path = Path(unit.location)
    stop = math.inf if path.suffix.lower() in (".gz", ".zst") else unit.stop
    with _open_stream(path) as file:
        position = 0
        if unit.start:
            file.seek(unit.start - 1)
            position = unit.start - 1 + len(file.readline())
        document: list[bytes] | None = None if unit.start else []
        for line in file:
            is_mine = position < stop
            if document is None and not is_mine:
                return
            position += len(line)
            before, *after = [b"", b""] if line.rstrip(b" \t\r\n") == _DOCUMENT_END else line.split(b"\f")
            if document is not None:
                document.append(before)
            for piece in after:
                if document is not None:
                    yield _plain(document)
                if not is_mine:
                    return
                document = [piece]
        if document is not None:
            yield _plain(document)


def _plain(document: list[bytes]) -> str:
    return b"".join(document).decode("utf-8-sig").strip()


def _read_parquet(unit: Unit, text_field: str) -> Iterator[str]:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(unit.location)
    if text_field not in file.schema_arrow.names:
        raise UserError(_no_field(unit.location, text_field, file.schema_arrow.names))
    for batch in file.iter_batches(256, row_groups=range(unit.start, unit.stop), columns=[text_field]):
        for text in batch.column(0).to_pylist():
            yield _checked(text, text_field, unit.location, f"row groups {unit.start} to {unit.stop - 1}")


def _read_saved(unit: Unit, text_field: str) -> Iterator[str]:
    dataset = load_saved(unit.location)
    if text_field not in dataset.column_names:
        raise UserError(_no_field(unit.location, text_field, dataset.column_names))
    for start in range(unit.start, unit.stop, 256):
        for text in dataset[start : min(start + 256, unit.stop)][text_field]:
            yield _checked(text, text_field, unit.location, f"rows from {start}")


def _read_streamed(unit: Unit, text_field: str) -> Iterator[str]:
    shard = load_streamed(unit.location).shard(num_shards=unit.stop, index=unit.start)
    for row, record in enumerate(shard):
        if text_field not in record:
            raise UserError(_no_field(unit.location, text_field, record))
        yield _checked(record[text_field], text_field, unit.location, f"row {row} of part {unit.start}")


_READERS: dict[str, Callable[[Unit, str], Iterator[str]]] = {
    "bible": lambda unit, text_field: iter(bible.chapters()),
    "jsonl": _read_jsonl,
    "compressed": _read_compressed,
    "text": _read_text,
    "parquet": _read_parquet,
    "saved": _read_saved,
    "streamed": _read_streamed,
}


def _open_stream(path: Path) -> IO[bytes]:
    """Open a file for reading plain bytes, whatever compressed it."""
    if path.suffix.lower() == ".gz":
        import gzip

        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """Plain bytes of a .zst file. zstandard's own reader takes a file that was cut short for a complete one; this one
    raises EOFError.
    """

    def __init__(self, path: Path):
        import zstandard

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._compressed = self._plain = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            self._compressed = self._compressed or self._file.read(1 << 18)
            if self._frame.eof:
                if not self._compressed:
                    return 0
                self._frame = self._new_frame()
            elif not self._compressed:
                raise EOFError("the file ends within a Zstandard frame")
            self._plain = self._frame.decompress(self._compressed)
            self._compressed = self._frame.unused_data
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _parse(line: bytes, text_field: str, location: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"source {location}, {place}: not valid JSON ({error}); expected one object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"source {location}, {place}: found {type(record).__name__}, expected one JSON object a line")
    if text_field not in record:
        raise UserError(_no_field(f"{location}, {place}", text_field, record))
    return _checked(record[text_field], text_field, location, place)


def _checked(text: Any, text_field: str, location: str, place: str) -> str:
    """The field's text, with replacement characters where UTF-8 could not hold it."""
    if text is None:
        return ""  # a missing text counts as an empty document
    if not isinstance(text, str):
        raise UserError(f"source {location}, {place}: {text_field!r} is {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can hold and UTF-8 cannot
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_field(place: str, text_field: str, fields: Iterable[str]) -> str:
    found = ", ".join(map(repr, list(fields)[:12]))
    return f"source {place}: no field {text_field!r} (found {found}); name the right one with --text-field"


def load_saved(folder: str) -> Any:
    """A dataset of `save_to_disk`; of a dictionary of splits, its train split or its only one."""
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(folder)
    except Exception as error:
        raise UserError(f"source {folder}: not a readable saved dataset ({error})") from None
    if not isinstance(dataset, DatasetDict):
        return dataset
    if "train" not in dataset and len(dataset) != 1:
        raise UserError(f"source {folder}: splits {sorted(dataset)}, none called train; give one of their folders")
    return dataset["train"] if "train" in dataset else next(iter(dataset.values()))


@functools.lru_cache(maxsize=1)  # else every unit would ask the hub for its list of files
def load_streamed(spec: str) -> Any:
    from datasets import load_dataset

    is_local = Path(spec).exists()
    matched = None if is_local else HUB_NAME.fullmatch(spec)
    name, configuration, revision = (
        matched.group("name", "configuration", "revision") if matched else (spec, None, None)
    )
    try:
        return load_dataset(name, configuration, split="train", streaming=True, revision=revision)
    except Exception as error:
        # The second line of what `datasets` says may be the list of configurations.
        reason = " ".join(str(error).split()[:150]) or type(error).__name__
        raise UserError(
            f"source {spec}: `datasets` cannot load this folder ({reason}); give its files in another form"
            if is_local
            else f"source {spec}: no such local file or folder, and the Hugging Face hub does not give a dataset of that "
            f"name ({reason}); check the name (owner/name:configuration@revision) and the network, or give local files"
        ) from None
