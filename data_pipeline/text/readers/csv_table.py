"""Tables of comma- or tab-separated values, whose first line names the columns: one row, its text column."""

import csv
import io
from collections.abc import Iterator

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.base import Reader, Unit, checked_text, endings, missing_field
from data_pipeline.text.readers.streams import LONGEST_LINE, lines_of, open_plain


class CsvTable(Reader):
    """A file is one unit: where a row begins is known only from the file's beginning, as texts hold line ends."""

    file_names = endings("csv", "tsv", compressed=True)
    often_metadata = True

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        csv.field_size_limit(LONGEST_LINE)
        delimiter = "\t" if ".tsv" in unit.location.lower()[-8:] else ","
        with io.TextIOWrapper(open_plain(unit.location), "utf-8-sig", newline="") as file:
            rows = csv.reader(lines_of(file, unit.location), delimiter=delimiter, strict=True)
            columns = next(rows, [])
            if text_field not in columns:
                if len(columns) == 1 and (other := next((sign for sign in ";\t|" if sign in columns[0]), None)):
                    raise UserError(
                        f"source {unit.location}: its first line {columns[0][:80]!r} has {other!r} between names, where {delimiter!r} is"
                        " expected; write it with commas as .csv, or with tabs as .tsv"
                    )
                raise missing_field(unit.location, text_field, columns)
            if columns.count(text_field) > 1:
                raise UserError(
                    f"source {unit.location}: {columns.count(text_field)} columns are called {text_field!r}; rename all but the one that "
                    "holds the text"
                )
            column = columns.index(text_field)
            for row in rows:
                if row and len(row) != len(columns):
                    raise UserError(
                        f"source {unit.location}, line {rows.line_num}: {len(row)} cells, but the first line names {len(columns)} "
                        "columns; mend the line (a text with commas, quotes or line ends stands in quotes)"
                    )
                if row:
                    yield checked_text(row[column], text_field, f"{unit.location}, line {rows.line_num}")
