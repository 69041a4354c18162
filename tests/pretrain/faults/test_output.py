"""What cannot be written is lost, and the run goes on: a reader that is gone, a terminal that hung up, a full disk."""

import contextlib
import errno
import os
import sys
from pathlib import Path

import pytest

from pretrain.faults.output import LineFile, lasting_output


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def hung_up_terminal() -> int:
    """Whose other side is closed, so that writes meet EIO."""
    main, terminal = os.openpty()
    os.close(main)
    return terminal


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("place", [closed_pipe, hung_up_terminal, full_disk])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_that_nobody_takes_ends_nothing(monkeypatch: pytest.MonkeyPatch, place, name: str) -> None:
    stream = os.fdopen(place(), "w")
    monkeypatch.setattr(sys, name, stream)

    @lasting_output()
    def job() -> int:
        for number in range(3000):  # more than a buffer holds
            print("step", number, file=getattr(sys, name), flush=number % 2 == 0)
        return number

    assert job() == 2999
    assert getattr(sys, name) is stream
    with contextlib.suppress(OSError):
        stream.close()


def test_a_lasting_stream_is_the_stream_in_all_else(capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output():
        print("a line")
        assert sys.stdout.encoding.lower() == "utf-8"
        assert not sys.stdout.isatty()
    assert capsys.readouterr().out == "a line\n"


class Disk:
    """An open file on a disk that has room for some bytes more."""

    def __init__(self, path: Path, room: int) -> None:
        self.file, self.room = path.open("ab", buffering=0), room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("room", range(16))
def test_lines_for_which_there_is_no_room_are_lost_and_no_others(tmp_path: Path, capsys, room: int) -> None:
    path = tmp_path / "lines"
    lines = LineFile(path)
    lines.write("before")
    lines._file = Disk(path, room)  # type: ignore[assignment]
    for number in range(4):
        lines.write(f"full {number}")
    lines._file = Disk(path, 1000)  # type: ignore[assignment]
    lines.write("after")
    lines.close()
    found = path.read_text()
    assert found.startswith("before\n")
    assert found.endswith("\nafter\n")
    whole = [line for line in found.splitlines() if line in {f"full {number}" for number in range(4)}]
    assert len(whole) == room // 7 + (room % 7 == 6)  # its end came with the next line
    assert capsys.readouterr().err.count("lines are lost") == 1


def test_a_torn_line_is_ended_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n{"b')
    lines = LineFile(tmp_path / "lines")
    lines.write("next")
    assert (tmp_path / "lines").read_text() == '{"a": 1}\n{"b\nnext\n'
    lines.close()
    LineFile(tmp_path / "nowhere" / "lines").write("lost")
