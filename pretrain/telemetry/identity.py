"""Who a run is to others, such as Weights & Biases: an id that goes with its folder, but not with the folder's copies."""

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from data_pipeline.core.outside import parse_json
from data_pipeline.core.storage import write_text

IDENTITY = "identity.json"


def run_id(run: Path) -> str:
    """The id in a run's folder. It stays where the folder is renamed or mounted elsewhere (the same inode) and where it comes back from a
    backup (the same path on the same host); a folder with neither is a copy, which continues as a run of its own. Raises: OSError.
    """
    here = {"path": f"{socket.gethostname()}:{run.resolve()}", "inode": run.stat().st_ino}
    known: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        known = parse_json((run / IDENTITY).read_text(encoding="utf-8"))
    is_same = any(known.get(name) == value for name, value in here.items())
    now: dict[str, Any] = {"id": known["id"] if is_same else os.urandom(8).hex(), **here}
    if now != known:
        write_text(run / IDENTITY, json.dumps(now))
    return now["id"]
