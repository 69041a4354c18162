"""What others wrote, before it is believed: names have a grammar, sizes a bound, JSON a depth.

Nothing that was downloaded (shards, checkpoints, caches, configurations of runs) and no argument names a file outside its own
folder, an option of another program, or more memory than there is reason for (docs/security.md).
"""

import json
import re
from collections.abc import Callable
from typing import IO, Any

from data_pipeline.core.errors import UserError

HOST = re.compile(r"[\w@][\w.@:-]*", re.ASCII)
"""A host, with a user before it where need be: user@node01. It cannot be an option."""
VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
"""An environment variable."""
FILE = re.compile(r"\w[\w.@+-]*", re.ASCII)
"""A file of a folder, which is not above or below it."""
WORD = re.compile(r"[\w@%+=:,./-]+", re.ASCII)
"""What a shell takes for one word, and for nothing else."""

LARGEST_MANIFEST = 1 << 28
"""Bytes of a manifest or a tokenizer: twice what the largest have."""
DEEPEST = 100
"""JSON inside JSON: what is deeper was made to break its reader."""
_PIECE = 1 << 20


def named(pattern: re.Pattern[str], text: str, what: str, remedy: str) -> str:
    """The text itself. Raises: UserError that begins with `what` and ends with the remedy, unless all of it is what the pattern says."""
    if not pattern.fullmatch(text):
        raise UserError(f"{what} is {text[:80]!r}; expected {pattern.pattern}: {remedy}")
    return text


def parse_json(data: str | bytes, hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`json.loads` of what may be anything; `hook` is its object_pairs_hook. Raises: ValueError, whatever is wrong."""
    try:
        found = json.loads(data, object_pairs_hook=hook)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} deep") from None
    layer: list[Any] = [found]
    for _ in range(DEEPEST):
        layer = [inner for value in layer if isinstance(value, dict | list) for inner in _inside(value)]
        if not layer:
            return found
    raise ValueError(f"nested more than {DEEPEST} deep")


def _inside(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def read_at_most(file: IO[bytes], most: int = LARGEST_MANIFEST) -> bytes:
    """All of a file, in pieces that grow with what is there. Raises: ValueError, if it is longer."""
    pieces, size = [], 0
    while piece := file.read(min(_PIECE, most + 1 - size)):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ValueError(f"more than the {most:,} bytes that are allowed here")
    return b"".join(pieces)
