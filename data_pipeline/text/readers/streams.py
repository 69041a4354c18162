"""The plain bytes of a file, whatever compressed it, and its lines: both in pieces of bounded size, whatever the file claims."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from typing import IO, Any, AnyStr, NamedTuple, cast

from data_pipeline.core.errors import UserError

LONGEST_LINE = 1 << 28
"""Bytes (of text, characters) of a line, a record or a value: what is longer was made to fill the memory."""
LONGEST_DOCUMENT = 1 << 30
"""Bytes of a document of plain text."""
_PIECE = 1 << 11
"""Compressed bytes at a time. A block of 128 KiB may take four (Zstandard), so that no more than 64 MiB come out at once."""
_PLAIN_PIECE = 1 << 20
"""Plain bytes at a time of the formats whose readers can be told."""
LARGEST_ZSTD_WINDOW = 1 << 31  # `zstd --long=31`, the most that the format's own tools read; 128 MiB unless asked for


class _Compression(NamedTuple):
    name: str
    magic: tuple[bytes, ...]
    open: Callable[[str], Any]


def compression(location: str) -> str | None:
    """The ending of its name that says how it is compressed."""
    ending = location.rpartition(".")[2].lower()
    return ending if ending in _COMPRESSIONS else None


def open_plain(location: str) -> IO[bytes]:
    """Open a file for reading plain bytes. Raises UserError if it is not compressed as its name says."""
    named = compression(location)
    with open(location, "rb") as file:
        start = file.read(16)
    found = next((name for name, kind in _COMPRESSIONS.items() if start.startswith(kind.magic)), None)
    if named and not start:
        raise EOFError("the file is empty, which no compressed file is")
    if other := next((what for magic, what in _NO_TEXT.items() if start.startswith(magic)), None):
        raise UserError(
            f"source {location}: holds {other}, against its name; unpack or convert it, or give it the ending of what it is"
        )
    if found != named:
        its = f"{_COMPRESSIONS[found].name} data" if found else f"no {_COMPRESSIONS[cast(str, named)].name} data"
        raise UserError(
            f"source {location}: holds {its}, against its name (it begins with {start!r}); give it the ending of what it is "
            f"({', '.join(f'.{name}' for name in _COMPRESSIONS)}, or none of these), or fetch it again"
        )
    return cast(IO[bytes], _COMPRESSIONS[named].open(location)) if named else open(location, "rb")


def _open_zstd(location: str) -> IO[bytes]:
    import zstandard

    return _in_frames(location, zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTD_WINDOW).decompressobj)


def _in_frames(location: str, new_frame: Callable[[], Any]) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(_FramesFile(location, new_frame), 1 << 20))


class _FramesFile(io.RawIOBase):
    """Plain bytes of a file of one or more compressed frames, as parallel compressors write them.

    The libraries' own readers lose text without a word: zstandard's takes a file that was cut short for a complete one, those of
    bz2 and lzma pass over all that comes behind a damaged beginning of a later frame. This one raises what is wrong.
    """

    def __init__(self, location: str, new_frame: Callable[[], Any]):
        self._file = open(location, "rb")  # noqa: SIM115 (closed by close)
        self._new_frame = new_frame
        self._frame = self._new_frame()
        # Readers that can be told how much to give keep the rest of what they were fed until they are asked again.
        self._most = (_PLAIN_PIECE,) if hasattr(self._frame, "needs_input") else ()
        self._compressed, self._at = b"", 0
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            piece = b""
            if self._frame.eof or not self._most or self._frame.needs_input:
                if self._at == len(self._compressed):
                    self._compressed, self._at = self._file.read(1 << 18), 0
                if not self._compressed:
                    if self._frame.eof:
                        return 0
                    raise EOFError("the file ends within a compressed frame")
                if self._frame.eof:
                    # Zero bytes between frames are padding, with which none begins.
                    self._at = len(self._compressed) - len(self._compressed[self._at :].lstrip(b"\0"))
                    if self._at == len(self._compressed):
                        continue
                    self._frame = self._new_frame()
                piece = self._compressed[self._at : self._at + _PIECE]
            self._plain = memoryview(self._frame.decompress(piece, *self._most))
            self._at += len(piece) - len(self._frame.unused_data)
        count = min(len(buffer), len(self._plain))
        buffer[:count], self._plain = self._plain[:count], self._plain[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


_SKIPPABLE_ZSTD = tuple(
    bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60)
)  # frames of metadata: pzstd begins so
_BZIP2_BLOCK, _BZIP2_END = b"1AY&SY", b"\x17rE8P\x90"
_BZIP2 = tuple(b"BZh%d%b" % (level, what) for level in range(1, 10) for what in (_BZIP2_BLOCK, _BZIP2_END))
_COMPRESSIONS = {
    "gz": _Compression("gzip", (b"\x1f\x8b",), gzip.open),
    "zst": _Compression("Zstandard", (b"\x28\xb5\x2f\xfd", *_SKIPPABLE_ZSTD), _open_zstd),
    "bz2": _Compression("bzip2", _BZIP2, lambda location: _in_frames(location, bz2.BZ2Decompressor)),
    "xz": _Compression("xz", (b"\xfd7zXZ\x00",), lambda location: _in_frames(location, lzma.LZMADecompressor)),
}


_NO_TEXT = {
    b"PK\x03\x04": "a ZIP archive", b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive", b"Rar!\x1a\x07": "a RAR archive", b"%PDF-": "a PDF",
    b"PAR1": "a Parquet table", b"ARROW1\0\0": "an Arrow table", b"SQLite format 3\0": "an SQLite database",
}  # fmt: skip
"""Beginnings of files that are sometimes called what they are not."""


def lines_of(file: IO[AnyStr], location: str, longest: int = LONGEST_LINE) -> Iterator[AnyStr]:
    """The lines of an open file, with their ends. Raises: UserError for one that is too long to be one."""
    while line := file.readline(longest + 1):
        if len(line) > longest:
            raise too_long(location, longest)
        yield line


def too_long(location: str, longest: int) -> UserError:
    """The error for a line, a value or a document without end."""
    return UserError(
        f"source {location}: a line or document of more than {longest / 2**20:,.0f} MiB; divide it, or take the file out of the source"
    )


def skip_begun_line(file: IO[bytes], start: int, stop: int) -> int:
    """Go to the first line that begins in [start, stop), or to `stop` if none does; the place.

    No more is read than the range: a file that is a single line costs its units what it costs one.
    """
    if not start:
        return 0
    file.seek(start - 1)
    file.readline(stop - start + 1)
    return file.tell()
