"""The quickstart's text by its name, `bible`: a chapter a document (bible.py)."""

import re
from collections.abc import Iterator

from data_pipeline.text import bible
from data_pipeline.text.readers.base import Reader, Unit


class Scripture(Reader):
    """A unit is a run of chapters."""

    is_local = False
    has_fields = False
    file_names = re.compile(bible.NAME)

    def takes(self, location: str) -> bool:
        return location == bible.NAME

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        number = len(bible.chapters())
        step = max(1, number * unit_bytes // sum(map(len, bible.chapters())))
        return [self.unit(location, start, min(start + step, number), unit_bytes) for start in range(0, number, step)]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        yield from bible.chapters()[unit.start : unit.stop]
