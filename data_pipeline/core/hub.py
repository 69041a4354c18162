"""The Hugging Face hub: what is meant as a local path is not asked for there, and one attempt tells whether there is a network."""

import functools
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import LARGEST_MANIFEST

CONNECT_TIMEOUT_S = 5.0
_OFFLINE = "HF_HUB_OFFLINE"
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


@contextmanager
def without_hub() -> Iterator[None]:
    """Within it the hub's libraries take what was downloaded before, and ask nobody: for names that somebody else may have written."""
    before = os.environ.get(_OFFLINE)
    _set_offline("1")
    try:
        yield
    finally:
        _set_offline(before)


def _set_offline(value: str | None) -> None:
    os.environ.pop(_OFFLINE, None)
    if value is not None:
        os.environ[_OFFLINE] = value
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:  # imported before, with its own copy of the variable
        constants.HF_HUB_OFFLINE = (value or "0").upper() in ("1", "ON", "YES", "TRUE")  # type: ignore[attr-defined]


def find_model(name: str, what: str, expected: str) -> None:
    """Call before a model's name, a local folder or a hub id, goes to transformers: a missing folder is said, and a missing network known.

    Raises: UserError as `check_hub_id`.
    """
    if Path(name).is_dir():
        for file in Path(name).glob("*.json"):  # which libraries read as a whole
            if not file.is_file() or file.stat().st_size > LARGEST_MANIFEST:
                raise UserError(
                    f"{what} {name}: {file.name} is no file, or one of more than {LARGEST_MANIFEST:,} bytes; expected {expected}"
                )
    else:
        check_hub_id(name, what, expected)
        use_hub()


def check_hub_id(name: str, what: str, expected: str) -> None:
    """Refuse what can only be a local path, which is not there, or no folder; before a hub id is used.

    Raises: UserError, beginning with `what`, ending with what is `expected`.
    """
    if (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or Path(name).suffix in (".json", ".jsonl")
        or (Path(name).exists() and not Path(name).is_dir())
    ):
        raise UserError(f"{what} {name}: no such folder or file; expected {expected}")


@functools.cache
def use_hub() -> None:
    """Call before anything that asks the hub: where it is out of reach, its libraries use their caches, at once and for good.

    By themselves they try again and again, file by file, for half a minute before they look into their caches.
    """
    if os.environ.get(_OFFLINE) or any(os.environ.get(name) for name in _PROXIES):
        return  # behind a proxy, only the libraries know the way
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        print(
            f"{place.hostname} is out of reach ({error}): only what has been downloaded before is found",
            file=sys.stderr,
        )
        _set_offline("1")
