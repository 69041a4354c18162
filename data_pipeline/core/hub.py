"""The Hugging Face hub: what is meant as a local path is not asked for there, and one attempt tells whether there is a network."""

import functools
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

from data_pipeline.core.errors import UserError

CONNECT_TIMEOUT_S = 5.0
_PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")


def find_model(name: str, what: str, expected: str) -> None:
    """Call before a model's name, a local folder or a hub id, goes to transformers: a missing folder is said, and a missing network known.

    Raises: UserError as `check_hub_id`.
    """
    if not Path(name).is_dir():
        check_hub_id(name, what, expected)
        use_hub()


def check_hub_id(name: str, what: str, expected: str) -> None:
    """Refuse what can only be a local path, which is not there; before a hub id is used.

    Raises: UserError, beginning with `what`, ending with what is `expected`.
    """
    if (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or Path(name).suffix in (".json", ".jsonl")
    ):
        raise UserError(f"{what} {name}: no such folder or file; expected {expected}")


@functools.cache
def use_hub() -> None:
    """Call before anything that asks the hub: where it is out of reach, its libraries use their caches, at once and for good.

    By themselves they try again and again, file by file, for half a minute before they look into their caches.
    """
    if os.environ.get("HF_HUB_OFFLINE") or any(os.environ.get(name) for name in _PROXIES):
        return  # behind a proxy, only the libraries know the way
    place = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        print(
            f"{place.hostname} is out of reach ({error}): only what has been downloaded before is found",
            file=sys.stderr,
        )
        os.environ["HF_HUB_OFFLINE"] = "1"
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None:  # imported before, with its own copy of the variable
            constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
