"""What may be told: text without passwords, and without characters that a terminal would obey.

Errors (`UserError`), commands' output (`cli`), run folders, checkpoints, logs and recorders all go through here.
"""

import re
from typing import Any, TextIO

HIDDEN = "***"
_PASSWORDS = r"PASS|PWD|SECRET|TOKEN(?!IZERS)|(?<!IB_P)KEY|AUTH|CRED|COOKIE|SIGNATURE|BEARER"
_SECRET_NAME = re.compile(_PASSWORDS, re.IGNORECASE)
_USER_OF_URL = re.compile(r"(?<=://)[^\s/?#\"'<>]+(?=@)")
_SECRET_OF_QUERY = re.compile(rf"(?<=[?&])([\w.-]*(?:{_PASSWORDS}|SIG)[\w.-]*=)[^\s&#\"'<>]+", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def tellable(text: str) -> str:
    """The text as it may be printed or written down: `without_passwords`, and with control characters as `printable` shows them."""
    return without_passwords(printable(text))


def printable(text: str) -> str:
    r"""Control characters but newline and tab as \u001b, which a terminal shows instead of obeying, and JSON reads as before."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_passwords(value: Any) -> Any:
    """A text, or whatever holds texts (JSON-able), with *** in place of users, passwords and keys in URLs.

    https://me:pass@host/x?token=abc becomes https://***@host/x?token=***.
    """
    if isinstance(value, str):
        if "://" not in value:
            return value
        return _SECRET_OF_QUERY.sub(rf"\g<1>{HIDDEN}", _USER_OF_URL.sub(HIDDEN, value))
    if isinstance(value, dict):
        return {name: without_passwords(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_passwords(inner) for inner in value]
    return value


def is_secret(name: str, value: str = "") -> bool:
    """Whether a variable of this name and value may hold a password: HF_TOKEN, WANDB_API_KEY, NCCL_PASSWD, or a URL with one."""
    return _SECRET_NAME.search(name) is not None or without_passwords(value) != value


class Tellable:
    """A text stream to which only what is tellable is written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(tellable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
