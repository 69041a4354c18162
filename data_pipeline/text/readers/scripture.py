"""The quickstart's text by its name, `bible`: a chapter a document (bible.py)."""

import re
from collections.abc import Iterator

from data_pipeline.text import bible
from data_pipeline.text.readers.base import Reader, Unit


class Scripture(Reader):
    """All of it is one unit."""

    is_local = False
    file_names = re.compile(bible.NAME)

    def takes(self, location: str) -> bool:
        return location == bible.NAME

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        return [self.unit(location, 0, len(bible.chapters()), unit_bytes)]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        yield from bible.chapters()
