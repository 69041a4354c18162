"""All readers: ours by this table, others' by the entry points `textldm.readers`; and the one place where what they meet is told."""

import errno
import functools
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.core import plugins
from data_pipeline.core.errors import ENDINGS, TRACEBACK, UserError, reason
from data_pipeline.text.readers.base import Reader, Unit

OWN = {
    "jsonl": "data_pipeline.text.readers.jsonl:JsonLines",
    "text": "data_pipeline.text.readers.text:Text",
    "parquet": "data_pipeline.text.readers.parquet:Parquet",
    "arrow": "data_pipeline.text.readers.arrow:Arrow",
    "saved": "data_pipeline.text.readers.saved:SavedDataset",
    "json": "data_pipeline.text.readers.json_values:JsonValues",
    "csv": "data_pipeline.text.readers.csv_table:CsvTable",
    "bible": "data_pipeline.text.readers.scripture:Scripture",
    "hub": "data_pipeline.text.readers.hub:Hub",
}


@contextmanager
def naming(location: str) -> Iterator[None]:
    """Make one line of any exception: every library has its own for damaged files, and they change with its versions."""
    try:
        yield
    except (UserError, *ENDINGS):
        raise
    except BaseException as error:
        raise UserError(f"source {location}: cannot be read ({reason(error)}); {_remedy(error)}") from error


@functools.cache
def reader(name: str) -> Reader:
    """The reader of that name. Raises: UserError."""
    return plugins.load("readers", name, OWN)(name)


def reader_of(location: str, is_local: bool = True) -> Reader | None:
    """The first reader, ours before others', that takes the file or folder; or, with `is_local` False, a name of something else."""
    with naming(location):
        readers = map(reader, _names())
        return next((found for found in readers if found.is_local == is_local and found.takes(location)), None)


def units_of(found: Reader, location: str, unit_bytes: int) -> list[Unit]:
    """Units of what the reader takes. Raises UserError naming the file, whatever a library makes of it."""
    with naming(location):
        return found.units(location, unit_bytes)


def read_unit(unit: Unit, text_field: str = "text") -> Iterator[str | None]:
    """Documents of one unit; None where a record's text is null. Raises UserError naming the place of what cannot be read."""
    with naming(unit.location):
        yield from reader(unit.reader).documents(unit, text_field)


@functools.cache
def _names() -> list[str]:
    return plugins.names("readers", OWN)


def _remedy(error: BaseException) -> str:
    """What to do about it."""
    if isinstance(error, FileNotFoundError):
        return "it was there when the source was opened: leave the source as it is until all of it is read, and start again"
    if isinstance(error, PermissionError):
        return "give this user the right to read it, or take it out of the source"
    if isinstance(error, MemoryError):
        return "run with fewer --workers, or cut the file into smaller ones"
    if isinstance(error, ImportError):
        return "install that package"
    if isinstance(error, UnicodeError):
        return "it is not UTF-8: convert it, for example with iconv"
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN):
        return "check the disk or the mount that it lies on, then run the same command again"
    return f"mend it, fetch it again, or take it out of the source ({TRACEBACK}=1 in the environment shows where)"
