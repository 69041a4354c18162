"""JSON lines, plain or compressed: one object a line, its text field."""

import json
import os
from collections.abc import Iterator

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.base import Reader, Unit, endings, text_of
from data_pipeline.text.readers.streams import compression, lines_of, open_plain, skip_begun_line

BLANKS = b"\xef\xbb\xbf \t\r\n"  # with the mark that some editors put before UTF-8
_LINES_PER_BLOCK = 256
_MOST_PARTS = 16  # of a compressed file: each decompresses all of it, which is cheap beside tokenising its share
_EXPANSION = 4  # bytes of text in a byte compressed, about


class JsonLines(Reader):
    """A unit is a range of bytes, and of a compressed file every `stop`-th block of its lines, from the `start`-th."""

    file_names = endings("jsonl", "ndjson", "jsonlines", compressed=True)

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        size = os.path.getsize(location)
        if compression(location):
            parts = min(_MOST_PARTS, 1 + size // unit_bytes)
            return [self.unit(location, part, parts, _EXPANSION * size // parts) for part in range(parts)]
        stops = [min(start + unit_bytes, size) for start in range(0, size, unit_bytes)]
        return [self.unit(location, start, stop, stop - start) for start, stop in zip([0, *stops], stops)]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        lines = _block_lines(unit) if compression(unit.location) else _range_lines(unit)
        for place, line in lines:
            if line.strip(BLANKS):
                yield _parse(line, text_field, place)


def _range_lines(unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Lines that begin within the unit's bytes."""
    with open_plain(unit.location) as file:
        place = skip_begun_line(file, unit.start, unit.stop)
        lines = lines_of(file, unit.location)
        while place < unit.stop and (line := next(lines, b"")):
            yield f"{unit.location}, byte {place}", line
            place += len(line)


def _block_lines(unit: Unit) -> Iterator[tuple[str, bytes]]:
    """Every `stop`-th block of lines of a compressed file."""
    with open_plain(unit.location) as file:
        for number, line in enumerate(lines_of(file, unit.location)):
            if number // _LINES_PER_BLOCK % unit.stop == unit.start:
                yield f"{unit.location}, line {number + 1}", line


def _parse(line: bytes, text_field: str, place: str) -> str | None:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UserError(f"source {place}: not UTF-8 ({error}); convert the file, for example with iconv") from error
    except ValueError as error:
        several = (
            "; a file of several objects a line is read if it is called .json" if "Extra data" in str(error) else ""
        )
        raise UserError(
            f"source {place}: not valid JSON ({error}); expected one object a line: mend the line, or take it out{several}"
        ) from error
    except RecursionError as error:
        raise UserError(f"source {place}: brackets nested too deeply; mend the line, or take it out") from error
    if not isinstance(record, dict):
        array = "; a file that is one array is read if it is called .json" if isinstance(record, list) else ""
        raise UserError(f"source {place}: found {type(record).__name__}, expected one JSON object a line{array}")
    return text_of(record, text_field, place)
