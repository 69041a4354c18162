"""Arrow tables as files (Feather) or streams, such as the cache of `datasets` holds: one row, its text column."""

import itertools
import os
import struct
from collections.abc import Iterator
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.base import Reader, Unit, checked_text, endings, missing_field
from data_pipeline.text.readers.streams import LONGEST_LINE, too_long

LARGEST_BATCH = 1 << 32
"""Bytes of a record batch after unpacking: twice what a column of texts can have there. It is unpacked as a whole."""
ROWS_PER_BATCH = 16
"""Rows made into texts at once: many rows may name one long text of a dictionary, of which a column then holds as many copies."""
_FILE_MAGIC, _FILE_HEADER_BYTES = b"ARROW1", 8


class Arrow(Reader):
    """A file is one unit."""

    file_names = endings("arrow", "feather")

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        check_batches(unit.location)
        with open(unit.location, "rb") as file:
            schema, batches = _open(file)
            if text_field not in schema.names:
                raise missing_field(unit.location, text_field, schema.names)
            for number, batch in enumerate(batches):
                column = batch.column(text_field)
                for start in range(0, len(column), ROWS_PER_BATCH):
                    rows = column.slice(start, ROWS_PER_BATCH)
                    yield from column_texts(rows, text_field, f"{unit.location}, record batch {number}")


def column_texts(column: Any, text_field: str, place: str) -> Iterator[str | None]:
    """The texts of a few rows, one after the other. Raises: UserError for what is none, or has more than LONGEST_LINE bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.dictionary if isinstance(column, pa.DictionaryArray) else column
    kind = values.type
    holds_bytes = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)
    if holds_bytes and (pc.max(pc.binary_length(values)).as_py() or 0) > LONGEST_LINE:
        raise too_long(place, LONGEST_LINE)
    for value in column:
        yield checked_text(value.as_py(), text_field, place)


def check_batches(location: str) -> None:
    """Look at what every record batch and dictionary of a file would unpack to, before any is. Raises: UserError for too much.

    A compressed buffer begins with its plain size, for which memory is taken before the first byte of it is unpacked.
    """
    import pyarrow as pa

    with pa.memory_map(os.fsencode(location)) as file:
        file.seek(_FILE_HEADER_BYTES if file.read(len(_FILE_MAGIC)) == _FILE_MAGIC else 0)
        messages = pa.ipc.MessageReader.open_stream(file)
        for number in itertools.count():
            try:
                message = messages.read_next_message()
            except StopIteration:
                return
            if message.body is None:
                continue
            plain = _plain_bytes(message)
            if plain > LARGEST_BATCH:
                raise UserError(
                    f"source {location}: message {number} unpacks to {plain:,} bytes, and {LARGEST_BATCH:,} are allowed; write it with"
                    " smaller record batches, or take the file out of the source"
                )


def _plain_bytes(message: Any) -> int:
    """Bytes of a message's body after unpacking (https://arrow.apache.org/docs/format/Columnar.html: Message.fbs). Raises: struct.error."""
    data = memoryview(message.metadata)
    root = _Table(data, struct.unpack_from("<I", data)[0])
    header = root.table(2)
    batch = header.table(1) if message.type == "dictionary" else header
    buffers = batch.vector(2)
    if buffers is None:
        return 0
    if batch.at(3) is None:  # no compression
        return int(message.body.size)
    body, total = memoryview(message.body), 0
    start, count = buffers
    for number in range(count):
        offset, length = struct.unpack_from("<qq", data, start + 16 * number)
        if length >= 8:
            plain = struct.unpack_from("<q", body, offset)[0]
            total += length if plain < 0 else plain  # -1: as it is
    return total


class _Table:
    """A table of a FlatBuffer: places of its fields by their numbers."""

    def __init__(self, data: memoryview, place: int) -> None:
        self._data, self._place = data, place
        self._fields = place - struct.unpack_from("<i", data, place)[0]

    def at(self, field: int) -> int | None:
        """Where a field lies; None if it is not there."""
        if 4 + 2 * field >= struct.unpack_from("<H", self._data, self._fields)[0]:
            return None
        offset = struct.unpack_from("<H", self._data, self._fields + 4 + 2 * field)[0]
        return self._place + offset if offset else None

    def _target(self, field: int) -> int | None:
        place = self.at(field)
        return None if place is None else place + struct.unpack_from("<I", self._data, place)[0]

    def table(self, field: int) -> "_Table":
        """A table within this one. Raises: struct.error if it is not there."""
        target = self._target(field)
        if target is None:
            raise struct.error("a message without its header")
        return _Table(self._data, target)

    def vector(self, field: int) -> tuple[int, int] | None:
        """Where the elements of a vector begin, and how many there are."""
        target = self._target(field)
        return None if target is None else (target + 4, struct.unpack_from("<I", self._data, target)[0])


def _open(file: Any) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of either form."""
    import pyarrow as pa

    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    if not is_file:
        stream = pa.ipc.open_stream(file)
        return stream.schema, iter(stream)
    expected = pa.ipc.open_file(
        file
    ).num_record_batches  # its end says where they are, which must be where they were looked at
    file.seek(_FILE_HEADER_BYTES)
    stream = pa.ipc.open_stream(file)

    def batches() -> Iterator[Any]:
        found = 0
        for batch in stream:
            found += 1
            yield batch
        if found != expected:
            raise ValueError(f"it holds {found} record batches one after the other, and names {expected} at its end")

    return stream.schema, batches()
