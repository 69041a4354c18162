"""Text sources: where documents come from, cut into units that worker processes and machines read independently of each
other.

| spec | documents |
|---|---|
| `x.jsonl`, also `.jsonl.zst`, `.jsonl.gz` | one JSON object a line, its text field |
| `x.txt`, also `.txt.zst`, `.txt.gz` | the whole file, or its pieces between form feeds or `<|endoftext|>` lines |
| `x.parquet` | one row, its text column |
| a folder | all such files below it, by path, of splits that names tell apart train; or what `datasets` saved there or can load |
| `owner/name`, `owner/name:configuration@revision` | the train split of a Hugging Face dataset, streamed |
| `bible` | the Bible in Basic English, see bible.py |
| `installed` | English prose found on this machine, see installed_prose.py |
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.text import bible, installed_prose
from data_pipeline.text.units import HUB_NAME, Unit, load_saved, load_streamed, read_unit

UNIT_BYTES = 8 << 20  # of plain text; a unit is the grain of parallel work and of resuming
_SAVED_ROWS = 10_000

_READ_HERE = re.compile(r"\.(jsonl|txt)(\.zst|\.gz)?$|\.parquet$", re.IGNORECASE)
_TEXT = re.compile(r"\.txt(\.zst|\.gz)?$", re.IGNORECASE)
_READ_BY_DATASETS = re.compile(r"\.json(\.zst|\.gz)?$|\.(csv|arrow|tar)$", re.IGNORECASE)
_SPLIT_NAME = re.compile(r"(?<![a-z])(train(?:ing)?|validation|valid|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])")
_FILE_NAME = re.compile(r"\.(jsonl?|txt|parquet|csv|arrow|tar)(\.zst|\.gz)?$", re.IGNORECASE)


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
    if spec == bible.NAME:
        return Source(spec, [Unit("bible", spec, 0, 0)])
    if spec == "installed":
        return Source(spec, _file_units(installed_prose.cached_path()))
    path = Path(spec)
    if path.is_file():
        return Source(source_name(spec), _file_units(path), text_field)
    if path.is_dir():
        return Source(source_name(spec), _folder_units(path), text_field)
    matched = HUB_NAME.fullmatch(spec)
    if matched is None or _FILE_NAME.search(spec) or spec.startswith((".", "/", "~")):
        raise UserError(
            f"source {spec}: no such file or folder; expected .jsonl, .txt or .parquet (.zst and .gz too), a folder "
            "of them, "
            "a Hugging Face dataset (owner/name:configuration@revision, the last two if need be) or 'installed'"
        )
    return Source(spec, _streamed_units(spec), text_field)


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
        dataset = load_saved(str(folder))
        return [
            Unit("saved", str(folder), start, min(start + _SAVED_ROWS, len(dataset)), len(dataset))
            for start in range(0, len(dataset), _SAVED_ROWS)
        ]
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    readable = [path for path in files if _READ_HERE.search(path.name)]
    loadable = [path for path in files if _READ_BY_DATASETS.search(path.name)]
    if loadable and all(_TEXT.search(path.name) for path in readable):
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
    is_train = {path: names[-1].startswith("train") for path, names in splits.items() if names}
    if all(is_train.values()):
        return files
    return [path for path in files if is_train.get(path)] or files


def _endings(files: Iterable[Path]) -> str:
    """How many files there are with each ending, the most frequent first."""
    counts = Counter(re.search(r"(\.\w+)?(\.(zst|gz|xz|bz2))?$", path.name)[0] or "no ending" for path in files)  # type: ignore[index]
    named = [f"{count} {ending}" for ending, count in counts.most_common(6)]
    return ", ".join(named + ["..."] * (len(counts) > 6))


def _streamed_units(spec: str, size: int = 0) -> list[Unit]:
    num_shards = load_streamed(spec).num_shards
    return [Unit("streamed", spec, shard, num_shards, size) for shard in range(num_shards)]
