"""Plain text: the whole file, or its pieces between form feeds or `<|endoftext|>` lines."""

import math
import os
from collections.abc import Iterator

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.base import Reader, Unit, endings
from data_pipeline.text.readers.streams import (
    LONGEST_DOCUMENT,
    compression,
    lines_of,
    open_plain,
    skip_begun_line,
    too_long,
)

_DOCUMENT_END = b"<|endoftext|>"
_MOST_ZEROS = 10  # one byte in so many: text of Latin letters in UTF-16 has one in two


class Text(Reader):
    """A unit is a range of bytes; a compressed file is one."""

    file_names = endings("txt", "text", compressed=True)
    has_fields = False

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        size = os.path.getsize(location)
        if compression(location) or not size:  # an empty file is a document, an empty one
            return [self.unit(location, 0, size, size)]
        stops = [min(start + unit_bytes, size) for start in range(0, size, unit_bytes)]
        return [self.unit(location, start, stop, stop - start) for start, stop in zip([0, *stops], stops)]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        """Those behind a separator in a line that begins within the unit's bytes, and the file's first; one is held at a time."""
        stop = math.inf if compression(unit.location) else unit.stop
        with open_plain(unit.location) as file:
            position = skip_begun_line(file, unit.start, unit.stop)
            if unit.start and position >= stop:
                return  # no line begins here
            document: list[bytes] | None = None if unit.start else []
            size = 0
            for line in lines_of(file, unit.location, LONGEST_DOCUMENT):
                is_mine = position < stop
                if document is None and not is_mine:
                    return
                position += len(line)
                before, *after = [b"", b""] if line.rstrip(b" \t\r\n") == _DOCUMENT_END else line.split(b"\f")
                if document is not None:
                    document.append(before)
                    size += len(before)
                    if size > LONGEST_DOCUMENT:
                        raise too_long(unit.location, LONGEST_DOCUMENT)
                for piece in after:
                    if document is not None:
                        yield _plain(document, unit.location)
                    if not is_mine:
                        return
                    document, size = [piece], len(piece)
            if document is not None:
                yield _plain(document, unit.location)


def _plain(document: list[bytes], location: str) -> str:
    data = b"".join(document)
    text = data.decode("utf-8-sig")
    if _MOST_ZEROS * data.count(0) > len(data):
        raise UserError(
            f"source {location}: holds {data.count(0)} zero bytes in {len(data)}, so that it is no UTF-8 text: UTF-16 without its mark "
            "(convert it: iconv -f utf-16le -t utf-8), a file that a crash left without its contents, or no text at all"
        )
    return text.strip()
