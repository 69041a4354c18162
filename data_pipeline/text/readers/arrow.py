"""Arrow tables as files (Feather) or streams, such as the cache of `datasets` holds: one row, its text column."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.text.readers.base import Reader, Unit, checked_text, endings, missing_field

_FILE_MAGIC = b"ARROW1"


class Arrow(Reader):
    """A file is one unit."""

    file_names = endings("arrow", "feather")

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        with open(unit.location, "rb") as file:
            schema, batches = _open(file)
            if text_field not in schema.names:
                raise missing_field(unit.location, text_field, schema.names)
            for number, batch in enumerate(batches):
                for text in batch.column(text_field).to_pylist():
                    yield checked_text(text, text_field, f"{unit.location}, record batch {number}")


def _open(file: Any) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of either form."""
    import pyarrow as pa

    is_file = file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    file.seek(0)
    if is_file:
        table = pa.ipc.open_file(file)
        return table.schema, (table.get_batch(number) for number in range(table.num_record_batches))
    stream = pa.ipc.open_stream(file)
    return stream.schema, iter(stream)
