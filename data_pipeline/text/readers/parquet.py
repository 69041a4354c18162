"""Parquet: one row, its text column."""

from collections.abc import Iterator
from typing import Any

from data_pipeline.text.readers.arrow import ROWS_PER_BATCH, column_texts
from data_pipeline.text.readers.base import COLUMNS_PER_TEXT, Reader, Unit, endings, missing_field


class Parquet(Reader):
    """A unit is a run of row groups."""

    file_names = endings("parquet")

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        with open(location, "rb") as file:
            metadata = _open(file).metadata
        units, start, filled = [], 0, 0
        for group in range(metadata.num_row_groups):
            filled += metadata.row_group(group).total_byte_size
            if filled >= COLUMNS_PER_TEXT * unit_bytes or group + 1 == metadata.num_row_groups:
                units.append(self.unit(location, start, group + 1, filled // COLUMNS_PER_TEXT))
                start, filled = group + 1, 0
        return units

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        with open(unit.location, "rb") as stream:
            file = _open(stream)
            if text_field not in file.schema_arrow.names:
                raise missing_field(unit.location, text_field, file.schema_arrow.names)
            place = f"{unit.location}, row groups {unit.start} to {unit.stop - 1}"
            groups = range(unit.start, unit.stop)
            # A page is unpacked at once: 2 GiB by the format at most, whatever it claims.
            for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=[text_field]):
                yield from column_texts(batch.column(text_field), text_field, place)


def _open(file: Any) -> Any:
    """A Parquet file of an open one: by its name pyarrow would look for a URL in it."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(file)
