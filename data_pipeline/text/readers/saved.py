"""Folders that `datasets` wrote with `save_to_disk`: one row, its text column. A `DatasetDict` is a folder of such folders."""

import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import FILE, named, parse_json, read_at_most
from data_pipeline.text.readers.arrow import check_batches
from data_pipeline.text.readers.base import COLUMNS_PER_TEXT, Reader, Unit, checked_text, missing_field, size_of

_ROWS_PER_BATCH = 256


class SavedDataset(Reader):
    """A unit is a range of rows."""

    file_names = re.compile(r"(?!)")  # none: it is known by what lies in the folder

    def takes(self, location: str) -> bool:
        return all(os.path.isfile(os.path.join(location, name)) for name in ("state.json", "dataset_info.json"))

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        num_rows, num_bytes = len(_load(location)), size_of(location) // COLUMNS_PER_TEXT
        rows = max(1, num_rows * unit_bytes // max(1, num_bytes))
        stops = [min(start + rows, num_rows) for start in range(0, num_rows, rows)]
        return [
            Unit(self.name, location, start, stop, num_bytes * (stop - start) // num_rows, size_of(location))
            for start, stop in zip([0, *stops], stops)
        ]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        dataset = _load(unit.location)
        if text_field not in dataset.column_names:
            raise missing_field(unit.location, text_field, dataset.column_names)
        # The format with which it was saved (columns left out, tensors, tables) is that of another use.
        dataset = dataset.with_format(None).select_columns([text_field])
        for start in range(unit.start, unit.stop, _ROWS_PER_BATCH):
            for text in dataset[start : min(start + _ROWS_PER_BATCH, unit.stop)][text_field]:
                yield checked_text(text, text_field, f"{unit.location}, rows from {start}")


def _check_tables(location: str) -> None:
    """The folder says itself which files are its tables: they lie in it, and unpack to what memory holds. Raises: UserError."""
    with open(os.path.join(location, "state.json"), "rb") as file:
        state = parse_json(read_at_most(file))
    for entry in state.get("_data_files") or ():
        name = str(entry["filename"])
        named(
            FILE, name, f"source {location}: a table of state.json", "take the file out of it, or copy the folder again"
        )
        if os.path.islink(os.path.join(location, name)):
            raise UserError(f"source {location}: its table {name} is a link; put the file itself there")
        check_batches(os.path.join(location, name))


def _load(location: str) -> Any:
    """The dataset, whatever the folder is called: to `datasets` a path may be a URL or a chain of them (a::b)."""
    from datasets import load_from_disk

    _check_tables(location)
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "dataset")
        os.symlink(os.path.abspath(location), link)
        return load_from_disk(link)
