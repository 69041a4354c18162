"""What is told holds no password and no character that a terminal obeys (docs/security.md: attacks 10a, 14)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.telling import is_secret, printable, tellable, without_passwords

URL, SHOWN = (
    "https://me:p%40ss@host.example:8080/x?access_token=abc&n=1#f",
    "https://***@host.example:8080/x?access_token=***&n=1#f",
)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, SHOWN),
        ("https://hf_token@hub.example/x", "https://***@hub.example/x"),
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("postgres://me:a@b@host/x", "postgres://***@host/x"),
        ("https://x/y?X-Amz-Credential=a&X-Amz-Signature=b&sig=c&v=1", "https://x/y?X-Amz-Credential=***&X-Amz-Signature=***&sig=***&v=1"),
        *[(kept, kept) for kept in ("hf://datasets/a/b@main/c", "https://x/@me", "me@host", "a@b://c", "https://x/y?n=1", "data/x")],
    ],
)  # fmt: skip
def test_attack_10a_urls_lose_their_passwords_wherever_they_stand(url: str, shown: str) -> None:
    assert without_passwords(url) == shown
    assert without_passwords(f"reading '{url}' and \"{url}\" failed") == f"reading '{shown}' and \"{shown}\" failed"
    assert without_passwords({"a": [url, 1, None], "b": {"c": url}}) == {"a": [shown, 1, None], "b": {"c": shown}}
    assert json.loads(without_passwords(json.dumps({"a": url}))) == {"a": shown}
    assert without_passwords(shown) == shown
    assert is_secret("HF_ENDPOINT", url) is (url != shown)


CONTROLS = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))]


@pytest.mark.parametrize("control", CONTROLS)
def test_attack_14_control_characters_are_shown(control: str) -> None:
    text = f"a{control}b\tc\nd\u00e4\u200d\U0001f600"
    assert printable(text) == text.replace(control, f"\\u{ord(control):04x}")
    assert json.loads(f'"{printable(control)}"') == control
    assert str(UserError(f"found {text}")) == f"found {printable(text)}"


@pytest.mark.parametrize("ends_with", ["print", "UserError", "traceback"])
def test_attacks_10a_14_whatever_a_command_prints_is_tellable(tmp_path: Path, ends_with: str) -> None:
    """In a process of its own, as an exception's traceback is Python's matter."""
    (tmp_path / "command.py").write_text(f"""
import sys
from data_pipeline.core.errors import UserError, cli

@cli
def main(argv=None):
    said = "{URL} \\x1b[2J \\x9b31m"
    print("a", said)
    if {ends_with == "UserError"}:
        raise UserError(said)
    if {ends_with == "traceback"}:
        raise RuntimeError(said)

sys.exit(main([]))
""")
    done = subprocess.run([sys.executable, tmp_path / "command.py"], capture_output=True, text=True, check=False)
    told = f"{SHOWN} \\u001b[2J \\u009b31m"
    assert done.stdout == f"a {told}\n"
    assert done.returncode == {"print": 0, "UserError": 2, "traceback": 1}[ends_with]
    assert {"print": "", "UserError": f"error: {told}\n", "traceback": f"RuntimeError: {told}\n"}[
        ends_with
    ] in done.stderr
    assert "p%40ss" not in done.stderr
    assert "\x1b" not in done.stderr


def test_a_stream_that_is_told_to_is_otherwise_as_it_was(capsys: pytest.CaptureFixture) -> None:
    @cli
    def main(argv: list[str] | None = None) -> None:
        print("x\r", "\x1b", sep="|", end="", flush=True)
        assert not sys.stdout.isatty()

    before = sys.stdout
    assert main([]) == 0
    assert sys.stdout is before
    assert capsys.readouterr().out == tellable("x\r|\x1b")
