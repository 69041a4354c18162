"""The one error class for users' mistakes, and the wrapper that every command's `main` runs under."""

import contextlib
import errno
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from data_pipeline.core.home import settle_home
from data_pipeline.core.telling import Tellable, tellable

EXIT_USER = 2
"""The exit code of a user's mistake."""

TRACEBACK = "TEXTLDM_TRACEBACK"
"""Environment variable: 1 shows the traceback of a UserError, and of the exception behind it, before its line."""

_REASON_CHARACTERS = 800
_OF_PLACES = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EBUSY,
}  # fmt: skip
"""What is wrong with a place that was named, rather than with the program."""


class UserError(ValueError):
    """Bad input: the message says what was found, what was expected and what to do. Commands print it without a traceback.

    Names and contents of files go into messages as they are: control characters and passwords do not come out (telling.py).
    """

    def __init__(self, message: str) -> None:
        super().__init__(tellable(message))


ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What is not an error of whatever raised it. Everything else may be one: libraries in Rust panic with a bare BaseException."""


def reason(error: BaseException) -> str:
    """What an exception of another library says, on one line: its type and its message, shortened.

    For a UserError that is raised `from` it: nobody can list what a library may raise, so its boundary catches everything.
    """
    words = " ".join(str(error).split())
    shown = words if len(words) <= _REASON_CHARACTERS else f"{words[:_REASON_CHARACTERS]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def check_arguments(argv: Sequence[str]) -> None:
    """Refuse arguments with bytes that are no UTF-8, which no tokenizer and no JSON takes; names of files may have them.

    Raises: UserError naming the argument.
    """
    for place, argument in enumerate(argv):
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        try:
            argument.encode()
        except UnicodeEncodeError:
            if os.path.lexists(value or argument):
                continue
            before = argv[place - 1] if place and argv[place - 1].startswith("-") else ""
            name = (option if equals else before) or f"argument {place + 1}"
            shown = os.fsencode(value or argument)
            raise UserError(
                f"{name}: {shown[:80]!r} is not UTF-8; convert it (iconv -t utf-8), or set the terminal to UTF-8"
            ) from None


def check_early(read: Callable[[list[str] | None], object], argv: list[str] | None) -> None:
    """Before imports that take seconds: end the process with a line and exit code 2 if `read` finds a mistake in the arguments."""
    try:
        check_arguments(sys.argv[1:] if argv is None else argv)
        read(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER)


def cli(main: Callable[[list[str] | None], int | None]) -> Callable[..., int]:
    """Wrap a command's `main(argv)`: a UserError, or a place that cannot be used, becomes one line on stderr and exit code 2, Ctrl-C 130.

    TEXTLDM_TRACEBACK=1 in the environment prints the traceback before that line. What is printed is `tellable`.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        settle_home()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may hold what no encoding can print
            sys.stdout.reconfigure(errors="backslashreplace")
        sys.excepthook = _tell_exception
        try:
            check_arguments(sys.argv[1:] if argv is None else argv)
            stdout: Any = sys.stdout and Tellable(sys.stdout)  # None, where it was closed before the start
            with contextlib.redirect_stdout(stdout):
                return main(argv) or 0
        except UserError as error:
            if os.environ.get(TRACEBACK, "") not in ("", "0"):
                _tell_exception(type(error), error, error.__traceback__)
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:  # `command | head`: the reader has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return _tell_place(error)

    return run


def _tell_place(error: OSError) -> int:
    """One line for a file or folder that cannot be read or written; the exit code. Raises: the error, if it names no place."""
    if error.filename is None or error.errno not in _OF_PLACES:
        raise error
    if os.environ.get(TRACEBACK, "") not in ("", "0"):
        _tell_exception(type(error), error, error.__traceback__)
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
    print(
        tellable(f"error: {place}: {error.strerror}; name another place, or see to it that this one can be used"),
        file=sys.stderr,
    )
    return EXIT_USER


def _tell_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(tellable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
