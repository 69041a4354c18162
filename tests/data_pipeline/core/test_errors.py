"""A user's mistake is one line and exit code 2; the traceback comes on request."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.core.errors import EXIT_USER, UserError, check_arguments, cli, reason


@cli
def failing(argv: list[str] | None = None) -> None:
    """Fails because of another library."""
    try:
        raise KeyError("the cause")
    except KeyError as error:
        raise UserError(f"a.jsonl: cannot be read ({reason(error)}); fetch it again") from error


@pytest.mark.parametrize("value", [None, "", "0"])
def test_a_users_mistake_is_one_line(
    value: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("TEXTLDM_TRACEBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("TEXTLDM_TRACEBACK", value)
    assert failing([]) == EXIT_USER
    assert capsys.readouterr().err == "error: a.jsonl: cannot be read (KeyError: 'the cause'); fetch it again\n"


def test_the_traceback_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TEXTLDM_TRACEBACK", "1")
    assert failing([]) == EXIT_USER
    shown = capsys.readouterr().err
    assert 'raise KeyError("the cause")' in shown
    assert shown.splitlines()[-1].startswith("error: a.jsonl")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("several\n lines,\r\n\tblanks  "), "ValueError: several lines, blanks"),
        (RuntimeError(), "RuntimeError"),
        (OSError(2, "No such file", "a.txt"), "OSError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, said: str) -> None:
    assert reason(error).startswith(said.replace("OSError", type(error).__name__))
    assert "\n" not in reason(error)
    assert len(reason(ValueError("x" * 10**6))) < 1000


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--set", "data.path=%s"], "--set"),
        (["--text-field=%s"], "--text-field"),
        (["-x", "%s"], "-x"),
        (["a", "%s"], "argument 2"),
    ],
)
def test_an_argument_that_is_no_text_is_named(argv: list[str], name: str, capsys: pytest.CaptureFixture) -> None:
    bad = os.fsdecode(b"caf\xe9")
    assert failing([one.replace("%s", bad) for one in argv]) == EXIT_USER
    said = capsys.readouterr().err
    assert said.startswith(f"error: {name}: b'")
    assert r"caf\xe9" in said
    assert said.count("\n") == 1


def test_a_file_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / os.fsdecode(b"caf\xe9")
    file.touch()
    check_arguments(["--source", str(file), f"--source={file}"])


def test_names_that_no_encoding_can_print_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    @cli
    def naming(argv: list[str] | None = None) -> None:
        print(os.fsdecode(b"caf\xe9.jsonl"))

    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    assert naming([]) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"caf\\udce9.jsonl\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: (folder / "file").mkdir(), "file: Is a directory"),
        (lambda folder: folder.rmdir(), "file: No such file or directory"),
        (lambda folder: (folder.rmdir(), folder.touch()), "file: Not a directory"),
        (lambda folder: (folder / "file").symlink_to("file"), "file: Too many levels of symbolic links"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object], said: str
) -> None:
    (tmp_path / "a").mkdir()
    make(tmp_path / "a")

    @cli
    def writing(argv: list[str] | None) -> None:
        (tmp_path / "a" / "file").write_text("x")

    assert writing([]) == EXIT_USER
    shown = capsys.readouterr().err
    assert f"{said}; name another place" in shown
    assert shown.count("\n") == 1


def test_other_errors_of_the_system_stay_what_they_are() -> None:
    @cli
    def failing(argv: list[str] | None) -> None:
        raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        failing([])
