"""Text sources: where documents come from, cut into bundles of units that worker processes and machines read independently of each
other.

| spec | documents |
|---|---|
| a file | those of the reader that takes its name: `.jsonl`, `.json`, `.txt`, `.csv` (each also compressed), `.parquet`, `.arrow` |
| a folder | those of all such files below it, by path (folders.py says which); a folder that `datasets` saved |
| `owner/name`, `owner/name:configuration@revision` | the train split of a Hugging Face dataset, streamed |
| `bible` | the Bible in Basic English, see bible.py |
| `installed` | English prose found on this machine, see installed_prose.py |

The readers are in readers/, others may be installed.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.core.pointers import pointer
from data_pipeline.core.telling import printable, without_passwords
from data_pipeline.text import installed_prose
from data_pipeline.text.folders import list_folder, unpacking
from data_pipeline.text.readers.base import Reader, Unit, size_of
from data_pipeline.text.readers.registry import naming, read_unit, reader_of, units_of
from data_pipeline.text.readers.registry import reader as reader_named

UNIT_BYTES = 8 << 20  # of plain text; a bundle of units is the grain of parallel work and of resuming
_FEWEST_BUNDLES = 16  # a small source gives work to several processes too, down to a sixteenth of a unit

Bundle = tuple[Unit, ...]


@dataclass(frozen=True)
class Source:
    """Documents of a spec; iterating gives all of them in order.

    Attributes:
        bundles: units in order; those of small files are bundled, so that work is by bytes, not by files.
        statistics: how many files were found, read and left out for which reason; of a name that is no file, none.
        last: how many documents of the last bundle belong to it; None: all.
    """

    name: str
    bundles: list[Bundle]
    text_field: str = "text"
    statistics: dict[str, int] = field(default_factory=dict)
    last: int | None = None

    def __iter__(self) -> Iterator[str]:
        for number, bundle in enumerate(self.bundles, 1):
            most = self.last if number == len(self.bundles) else None
            yield from (text for text in islice(read_bundle(bundle, self.text_field), most) if text is not None)

    def units(self) -> Iterator[Unit]:
        """All units in order."""
        return (unit for bundle in self.bundles for unit in bundle)


def read_bundle(bundle: Bundle, text_field: str) -> Iterator[str | None]:
    """Documents of a bundle's units in order, as `read_unit` gives them."""
    return chain.from_iterable(read_unit(unit, text_field) for unit in bundle)


def read_pairs(bundle: Bundle, context_field: str, target_field: str) -> Iterator[tuple[str | None, str | None]]:
    """Contexts and targets of a bundle's records in order. A reader gives one field at a time, so records are read twice, side by side."""
    for unit in bundle:
        with naming(unit.location):
            yield from zip(read_unit(unit, context_field), read_unit(unit, target_field), strict=True)


def check_records(source: Source) -> None:
    """Refuse pairs of what has no records. Raises: UserError."""
    for unit in source.units():
        if not reader_named(unit.reader).has_fields:
            raise UserError(
                f"source {unit.location}: plain text, which has no fields; --context-field and --target-field take records: .jsonl, .json, "
                ".csv, .parquet, .arrow or a dataset; leave it out, or write its pairs so"
            )


def first_documents(source: Source, count: int) -> Source:
    """The source without what comes behind its first `count` documents, which are read to count them. Raises: UserError."""
    kept: list[Bundle] = []
    for bundle in source.bundles:
        kept.append(bundle)
        found = sum(1 for _ in islice(read_bundle(bundle, source.text_field), count))
        if found == count:
            return replace(source, bundles=kept, last=found)
        count -= found
    return source


def source_name(spec: str, split: str | None = None) -> str:
    """Name of a source as manifests record it: without the folders of this machine; with the split if one was asked for."""
    name = os.path.basename(os.path.realpath(spec)) if spec != "installed" and Path(spec).exists() else spec
    return without_passwords(os.fsencode(name).decode("utf-8", "replace") + (f"#{split}" if split else ""))


def files_hash(spec: str, units: Iterable[Unit]) -> str | None:
    """SHA-256 over the names below a local source and the sizes of the files that it takes; None of any other source."""
    if not Path(spec).exists():
        return None
    files = sorted({(os.path.relpath(unit.location, spec), unit.size) for unit in units})
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def open_source(
    spec: str,
    text_field: str = "text",
    split: str | None = None,
    output: str | None = None,
    follow_links: bool = False,
) -> Source:
    """Find the parts of a source; of a folder, print what is read and what is left out.

    Args:
        split: of a folder whose names tell splits apart, or of a hub dataset, the one to read (None: train; "all": of a
            folder, everything).
        output: a folder that is being written, which is no part of the source.
        follow_links: of a folder, read what links in it lead to elsewhere.

    Raises:
        UserError: there is nothing to read.
    """
    if spec == "installed":
        return Source(spec, _bundles([(path := str(installed_prose.cached_path()), _reader_of(path))]))
    if not os.path.lexists(spec):
        return _named_source(spec, text_field, split)
    if os.path.isdir(spec) and reader_of(spec) is None:
        listing = list_folder(spec, split, output, follow_links)
        print(printable(f"source {spec}: {listing.told()}"), flush=True)
        parts = [(file.path, file.reader) for file in listing.taken if file.reader]
        return Source(source_name(spec, split), _bundles(parts), text_field, listing.counts())
    if split is not None:
        raise UserError(f"--split {split}: {spec} is one part, without splits; leave --split out")
    reader = _reader_of(spec)
    _check_file(spec)
    return Source(source_name(spec), _bundles([(spec, reader)]), text_field, {"files_found": 1, "files_read": 1})


def _named_source(spec: str, text_field: str, split: str | None) -> Source:
    """What is no file: a dataset of the hub, or what another package's reader takes."""
    location = source_name(spec, split)
    is_file = reader_of(spec) is not None or unpacking(spec) != ""
    reader = None if is_file else reader_of(location, is_local=False)
    if reader is None:
        raise UserError(f"source {spec}: no such file or folder; expected {_EXPECTED}")
    return Source(location, _bundles([(location, reader)]), text_field)


_EXPECTED = (
    ".jsonl, .json, .txt, .csv (compressed or not), .parquet or .arrow, a folder of them, a Hugging Face dataset "
    "(owner/name:configuration@revision, the last two if need be), 'bible' or 'installed'"
)


def _reader_of(path: str) -> Reader:
    """The reader of a file that is there. Raises: UserError."""
    if (found := reader_of(path)) is None:
        raise UserError(f"source {path}: unknown kind of file; {unpacking(path) or f'expected {_EXPECTED}'}")
    return found


def _check_file(path: str) -> None:
    """Refuse a single part that cannot be read. Raises: UserError."""
    if not os.path.exists(path):
        raise UserError(f"source {path}: a link to {os.readlink(path)}, which does not exist")
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise UserError(
            f"source {path}: is no file but a pipe or device, which cannot be read twice; write it to a file first"
        )
    with naming(path):
        what = pointer(path) if os.path.isfile(path) else None
    if what:
        raise UserError(f"source {path}: a {what} instead of the contents, which were not fetched")


def _bundles(parts: list[tuple[str, Reader]]) -> list[Bundle]:
    """Units of all parts in order, joined until they hold what a unit of a large file holds."""
    total = sum(size_of(location) for location, _ in parts)
    unit_bytes = min(UNIT_BYTES, max(UNIT_BYTES // _FEWEST_BUNDLES, total // _FEWEST_BUNDLES))
    bundles: list[Bundle] = []
    held: list[Unit] = []
    num_bytes = 0
    for location, reader in parts:
        for unit in units_of(reader, location, unit_bytes):
            if held and num_bytes + unit.num_bytes > unit_bytes:
                bundles.append(tuple(held))
                held, num_bytes = [], 0
            held.append(unit)
            num_bytes += unit.num_bytes
    return bundles + [tuple(held)] * bool(held)
