"""What a reader of text is: which files or names it takes, the units that they are cut into, and the documents of a unit.

A reader is one class in one file. Ours stand in the table of registry.py; another package adds one by an entry point of the group
`textldm.readers` (docs/extending.md).
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.core.errors import UserError

COMPRESSIONS = ("gz", "zst", "bz2", "xz")
"""Endings that a reader may allow behind its own; streams.py opens them."""
COLUMNS_PER_TEXT = 8
"""Where a table's bytes are known with all columns, so small a share of them counts as text."""


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read independently of the others; kept in files and sent to worker processes.

    Attributes:
        reader: the name of its reader, by which any process finds it again.
        location: path of the file or folder, or the source's name where it is none.
        start, stop: the part [start, stop), in what the reader counts by: bytes, rows, row groups.
        num_bytes: of text, about; small units are bundled by it.
        size: bytes of the file or folder, to notice that it changed between two runs.
    """

    reader: str
    location: str
    start: int
    stop: int
    num_bytes: int
    size: int = 0

    def __str__(self) -> str:
        return f"{self.location}[{self.start}:{self.stop}]"


class Reader(ABC):
    """Reads one kind of file (or folder, or name). `file_names` and `documents` are enough for files that are read whole."""

    file_names: re.Pattern[str]
    """Searched for in a file's name."""

    has_fields = True
    """Whether a document is a field of a record, so that other fields of it can be read too (`read_pairs`)."""

    is_local = True
    """Whether it reads files and folders; else names of what is neither, such as a dataset of the hub."""

    often_metadata = False
    """Whether such files often describe others: in a folder that holds a corpus of another kind they are left out, and named."""

    def __init__(self, name: str):
        self.name = name

    def takes(self, location: str) -> bool:
        """Whether this reader reads what is called so."""
        return self.file_names.search(os.path.basename(location)) is not None and not os.path.isdir(location)

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        """Its parts, of about `unit_bytes` bytes of text each where it can be cut; in all they hold every document once."""
        size = os.path.getsize(location)
        return [self.unit(location, 0, size, size)]

    @abstractmethod
    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        """The unit's documents in order: text, "" where a record's text is empty, None where its field holds none (null).

        A record without the field is a UserError (`missing_field`). Exceptions of other libraries may pass: `read_unit` says
        in one line what was read and why it failed.
        """

    def unit(self, location: str, start: int, stop: int, num_bytes: int) -> Unit:
        """A unit of this reader."""
        return Unit(self.name, location, start, stop, num_bytes, size_of(location))


def endings(*names: str, compressed: bool = False) -> re.Pattern[str]:
    """Pattern for `file_names`: one of these endings, whatever the case; and behind it, if allowed, that of a compression."""
    behind = f"(?:\\.(?:{'|'.join(COMPRESSIONS)}))?" if compressed else ""
    return re.compile(rf"\.(?:{'|'.join(names)}){behind}$", re.IGNORECASE)


def size_of(location: str) -> int:
    """Bytes of a file, or of all files in a folder; 0 of what is neither."""
    if os.path.isdir(location):
        return sum(
            os.path.getsize(os.path.join(place, name)) for place, _, names in os.walk(location) for name in names
        )
    return os.path.getsize(location) if os.path.exists(location) else 0


def text_of(record: Mapping[str, Any], text_field: str, place: str) -> str | None:
    """The text of a record, None where it is null. Raises UserError where the record has no such field."""
    if text_field not in record:
        raise missing_field(place, text_field, record)
    return checked_text(record[text_field], text_field, place)


def checked_text(text: Any, text_field: str, place: str) -> str | None:
    """The text itself, with replacement characters where UTF-8 could not hold it."""
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"source {place}: {text_field!r} is {type(text).__name__}, expected text; name another field with --text-field"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can hold and UTF-8 cannot
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def missing_field(place: str, text_field: str, fields: Iterable[Any]) -> UserError:
    """The error for a record, or a table, without the text field."""
    found = ", ".join(map(repr, list(fields)[:12])) or "none"
    return UserError(
        f"source {place}: no field {text_field!r} (found {found}); name the right one with --text-field, of pairs with "
        "--context-field and --target-field"
    )
