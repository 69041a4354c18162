"""What a run writes for people must not end it: a reader that is gone, a terminal that hung up, a disk that is full."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.core.storage import FULL


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Until it is left, what cannot be written to stdout or stderr is lost, and nothing is raised."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Lasting(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose writes do not fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._whatever_happens():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._whatever_happens():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _whatever_happens(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:  # nobody will read it any more: what libraries print, too, goes nowhere
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class LineFile:
    """Appends lines to a file, each at once. One that cannot be written is lost, which is said; a torn line is ended by the next."""

    def __init__(self, path: Path) -> None:
        self._path, self._failed = path, False
        self._file: io.FileIO | None = None
        self._torn = _is_torn(path)

    def write(self, line: str) -> None:
        """Append a line, without its end."""
        data = b"\n" * self._torn + line.encode() + b"\n"
        try:
            self._file = self._file or self._path.open("ab", buffering=0)
            written = self._file.write(data) or 0
            self._torn = self._torn if not written else data[written - 1 : written] != b"\n"
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._failed:
                print(
                    f"{self._path}: {error.strerror}; lines are lost until that is mended", file=sys.stderr, flush=True
                )
            self._failed = True
        else:
            self._failed = False

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether a kill cut off the last line."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    return False
