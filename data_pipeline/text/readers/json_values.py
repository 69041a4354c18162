"""Files called .json: JSON lines by another name, an array of objects, or objects one behind the other on several lines."""

import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any, cast

from data_pipeline.core.errors import UserError
from data_pipeline.text.readers.base import Reader, Unit, endings, text_of
from data_pipeline.text.readers.jsonl import BLANKS, JsonLines
from data_pipeline.text.readers.streams import LONGEST_LINE, open_plain, too_long

_CHARACTERS = 1 << 20
_BLANKS = re.compile(r"[ \t\r\n]*")


class JsonValues(JsonLines):
    """What has one object a line is cut and read as JSON lines are; of anything else the file is one unit."""

    file_names = endings("json", compressed=True)
    often_metadata = True

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        return super().units(location, unit_bytes) if _is_lines(location) else Reader.units(self, location, unit_bytes)

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        if _is_lines(unit.location):
            yield from super().documents(unit, text_field)
            return
        for number, record in enumerate(_values(unit.location), 1):
            place = f"{unit.location}, value {number}"
            if not isinstance(record, dict):
                raise UserError(
                    f"source {place}: found {type(record).__name__}, expected objects, or one array of them"
                )
            yield text_of(record, text_field, place)


def _is_lines(location: str) -> bool:
    """Whether the first line that is not blank is an object, or the beginning of one that is too long to look at."""
    with open_plain(location) as file:
        while (line := file.readline(_CHARACTERS)) and not line.strip(BLANKS):
            pass
    if len(line) >= _CHARACTERS and not line.endswith(b"\n"):
        return line.lstrip(BLANKS).startswith(b"{")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _values(location: str) -> Iterator[Any]:
    """The elements of the file's array, or the values that stand one behind the other; one is held at a time."""
    with io.TextIOWrapper(open_plain(location), "utf-8-sig") as file:
        buffer = _Buffer(file)
        in_array = buffer.next_is("[")
        while buffer.next() and not (in_array and buffer.next_is("]")):
            yield buffer.value(location)
            if in_array and not buffer.next_is(",") and buffer.next() not in ("]", ""):
                raise UserError(
                    f"source {location}: a value is followed by {buffer.next()!r}, expected a comma; mend the file"
                )
        if in_array and (buffer.next() or not buffer.closed):
            raise UserError(
                f"source {location}: cut short, or more follows its array; expected one array of objects: fetch it again, or mend it"
            )


class _Buffer:
    """A text file's characters, of which those up to the end of the current value are in memory."""

    def __init__(self, file: IO[str]):
        self._file, self._text, self._place = file, "", 0
        self._decode = json.JSONDecoder().raw_decode
        self.closed = False

    def next(self) -> str:
        """The next character that is not a blank; "" at the end."""
        while True:
            self._place = cast(re.Match[str], _BLANKS.match(self._text, self._place)).end()
            if self._place < len(self._text):
                return self._text[self._place]
            self._text, self._place = self._file.read(_CHARACTERS), 0
            if not self._text:
                return ""

    def next_is(self, sign: str) -> bool:
        """Whether that character is next; then it is passed."""
        found = self.next() == sign
        self._place += found
        self.closed = found and sign == "]"
        return found

    def value(self, location: str) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, self._place = self._decode(self._text, self._place)
                return value
            except ValueError as error:
                rest = self._text[self._place :]
                if len(rest) > LONGEST_LINE:
                    raise too_long(location, LONGEST_LINE) from error
                more = self._file.read(len(rest) + _CHARACTERS)
                if not more:
                    raise UserError(f"source {location}: not valid JSON ({error}); mend the file") from error
                self._text, self._place = rest + more, 0
