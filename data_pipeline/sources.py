"""Text sources: where documents come from, cut into units that worker processes and machines read independently of each
other.

| spec | documents |
|---|---|
| `x.jsonl`, also `.jsonl.zst`, `.jsonl.gz` | one JSON object a line, its text field |
| `x.txt`, also `.txt.zst`, `.txt.gz` | the whole file, or its pieces between form feeds or `<|endoftext|>` lines |
| `x.parquet` | one row, its text column |
| a folder | all such files below it, by path, of splits that names tell apart train; or what `datasets` saved there or can load |
| `owner/name`, `owner/name:configuration@revision` | the train split of a Hugging Face dataset, streamed |
| `installed` | English prose found on this machine, see installed_prose.py |
"""

import functools
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_pipeline import installed_prose
from data_pipeline.errors import UserError

UNIT_BYTES = 8 << 20  # of plain text; a unit is the grain of parallel work and of resuming
_SAVED_ROWS = 10_000
_LINES_PER_BLOCK = 256
_DOCUMENT_END = b"<|endoftext|>"
_HUB_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<configuration>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)
_READ_HERE = re.compile(r"\.(jsonl|txt)(\.zst|\.gz)?$|\.parquet$", re.IGNORECASE)
_READ_BY_DATASETS = re.compile(r"\.json(\.zst|\.gz)?$|\.(csv|arrow|tar)$", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"(?<![a-z])(train(?:ing)?|validation|valid|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])")
_FILE_NAME = re.compile(r"\.(jsonl?|txt|parquet|csv|arrow|tar)(\.zst|\.gz)?$", re.IGNORECASE)


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


@dataclass(frozen=True)
class Source:
    """Documents of a spec; iterating gives all of them in order."""

    name: str
    units: list[Unit]
    text_field: str = "text"

    def __iter__(self) -> Iterator[str]:
        for unit in self.units:
            yield from read_unit(unit, self.text_field)


def source_name(spec: str) -> str:
    """Name of a source as manifests record it: without the folders of this machine."""
    return Path(spec).resolve().name if spec != "installed" and Path(spec).exists() else spec


def files_hash(spec: str, units: Iterable[Unit]) -> str | None:
    """SHA-256 over the names below a local source and the sizes of the files that it takes; None of any other source."""
    if not Path(spec).exists():
        return None
    files = sorted({(os.path.relpath(unit.location, spec), unit.size) for unit in units})
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def open_source(spec: str, text_field: str = "text") -> Source:
    """Find the parts of a source. Raises UserError if there is nothing to read."""
    if spec == "installed":
        return Source(spec, _file_units(installed_prose.cached_path()))
    path = Path(spec)
    if path.is_file():
        return Source(source_name(spec), _file_units(path), text_field)
    if path.is_dir():
        return Source(source_name(spec), _folder_units(path), text_field)
    matched = _HUB_NAME.fullmatch(spec)
    if matched is None or _FILE_NAME.search(spec) or spec.startswith((".", "/", "~")):
        raise UserError(
            f"source {spec}: no such file or folder; expected .jsonl, .txt or .parquet (.zst and .gz too), a folder "
            "of them, "
            "a Hugging Face dataset (owner/name:configuration@revision, the last two if need be) or 'installed'"
        )
    return Source(spec, _streamed_units(spec), text_field)


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


def _file_units(path: Path) -> list[Unit]:
    """Units of one file, by its name's ending."""
    size = path.stat().st_size
    names = path.name.lower().split(".")
    compressed = names[-1] in ("zst", "gz")
    kind = names[-2] if compressed and len(names) > 1 else names[-1]
    if kind == "jsonl" and compressed:
        parts = min(
            16, 1 + size // UNIT_BYTES
        )  # each part decompresses the whole file, which is cheap beside tokenising it
        return [Unit("compressed", str(path), part, parts, size) for part in range(parts)]
    if kind == "txt" and compressed:
        return [Unit("text", str(path), 0, size, size)]
    if kind in ("jsonl", "txt"):
        step = min(UNIT_BYTES, max(UNIT_BYTES // 16, size // 16))  # a small file gives work to several processes too
        reader = "jsonl" if kind == "jsonl" else "text"
        return [Unit(reader, str(path), start, min(start + step, size), size) for start in range(0, size, step)]
    if kind == "parquet" and not compressed:
        return _parquet_units(path, size)
    raise UserError(f"source {path}: unknown kind of file; expected .jsonl, .txt (.zst and .gz too) or .parquet")


def _parquet_units(path: Path, size: int) -> list[Unit]:
    """Runs of row groups of about eight units' bytes (Parquet counts them uncompressed, other columns included)."""
    import pyarrow.parquet as pq
    from pyarrow import ArrowInvalid

    try:
        metadata = pq.ParquetFile(path).metadata
    except (ArrowInvalid, OSError) as error:
        raise UserError(f"source {path}: not a readable Parquet file ({error})") from None
    units, start, filled = [], 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).total_byte_size
        if filled >= 8 * UNIT_BYTES or group + 1 == metadata.num_row_groups:
            units.append(Unit("parquet", str(path), start, group + 1, size))
            start, filled = group + 1, 0
    return units


def _folder_units(folder: Path) -> list[Unit]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        dataset = _load_saved(str(folder))
        return [
            Unit("saved", str(folder), start, min(start + _SAVED_ROWS, len(dataset)), len(dataset))
            for start in range(0, len(dataset), _SAVED_ROWS)
        ]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    readable = [path for path in files if _READ_HERE.search(path.name)]
    loadable = [path for path in files if _READ_BY_DATASETS.search(path.name)]
    if loadable and all(".txt" in path.suffixes for path in readable):
        if readable:
            raise UserError(
                f"source {folder}: holds {_endings(files)}, and either the .txt or the others may be the text; give a folder "
                "that holds one of them"
            )
        return _streamed_units(str(folder), sum(path.stat().st_size for path in files))
    if readable:
        taken = _train_files(folder, readable)
        left = sorted(set(files) - set(taken))
        if left:
            print(f"source {folder}: reads {_endings(taken)}, leaves out {_endings(left)}", flush=True)
        return [unit for path in taken for unit in _file_units(path)]
    raise UserError(
        f"source {folder}: the folder holds no .jsonl, .txt or .parquet file and no saved dataset ({len(files)} other "
        "files)"
    )


def _train_files(folder: Path, files: list[Path]) -> list[Path]:
    """Those that a name calls train where others are called validation or test, as `datasets` would; else all."""
    splits = {path: _SPLIT_NAME.findall(path.relative_to(folder).as_posix().lower()) for path in files}
    train = [path for path in files if splits[path] and splits[path][-1].startswith("train")]
    return train if any(splits[path] for path in files if path not in train) and train else files


def _endings(files: Iterable[Path]) -> str:
    """How many files there are with each ending, the most frequent first."""
    counts = Counter(re.search(r"(\.\w+)?(\.(zst|gz|xz|bz2))?$", path.name)[0] or "no ending" for path in files)  # type: ignore[index]
    named = [f"{count} {ending}" for ending, count in counts.most_common(6)]
    return ", ".join(named + ["..."] * (len(counts) > 6))


def _streamed_units(spec: str, size: int = 0) -> list[Unit]:
    num_shards = _load_streamed(spec).num_shards
    return [Unit("streamed", spec, shard, num_shards, size) for shard in range(num_shards)]


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
    dataset = _load_saved(unit.location)
    if text_field not in dataset.column_names:
        raise UserError(_no_field(unit.location, text_field, dataset.column_names))
    for start in range(unit.start, unit.stop, 256):
        for text in dataset[start : min(start + 256, unit.stop)][text_field]:
            yield _checked(text, text_field, unit.location, f"rows from {start}")


def _read_streamed(unit: Unit, text_field: str) -> Iterator[str]:
    shard = _load_streamed(unit.location).shard(num_shards=unit.stop, index=unit.start)
    for row, record in enumerate(shard):
        if text_field not in record:
            raise UserError(_no_field(unit.location, text_field, record))
        yield _checked(record[text_field], text_field, unit.location, f"row {row} of part {unit.start}")


_READERS: dict[str, Callable[[Unit, str], Iterator[str]]] = {
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


def _load_saved(folder: str) -> Any:
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
def _load_streamed(spec: str) -> Any:
    from datasets import load_dataset

    is_local = Path(spec).exists()
    matched = None if is_local else _HUB_NAME.fullmatch(spec)
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
