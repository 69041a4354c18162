"""Parts that are found by name: our own by a table of places, others' by the entry points of installed packages.

A package adds a part without touching ours by declaring it, e.g. in its pyproject.toml:

    [project.entry-points."textldm.stages"]
    my_stage = "my_package.my_stage:KIND"
"""

import functools
import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoints, entry_points
from typing import Any

from data_pipeline.core.errors import UserError, reason


def names(group: str, own: Mapping[str, str]) -> list[str]:
    """All parts of a group, our own first."""
    return [*own, *sorted(set(_installed(group).names) - own.keys())]


def load(group: str, name: str, own: Mapping[str, str]) -> Any:
    """The part of that name; `own` maps names to "module:attribute". Imported only now. Raises: UserError."""
    if name in own:
        module, _, attribute = own[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    found = [point for point in _installed(group) if point.name == name]
    if not found:
        raise UserError(f"{name!r} is none of the known {group}: {', '.join(names(group, own))}")
    try:
        return found[0].load()
    except Exception as error:  # another package's code runs here
        raise UserError(
            f"{name!r} of {group} ({found[0].value}) cannot be loaded: {reason(error)}; mend or uninstall the package that declares it"
        ) from error


def _installed(group: str) -> EntryPoints:
    """What installed packages declare of a group."""
    return _on_path(group, tuple(sys.path))


@functools.lru_cache(maxsize=16)
def _on_path(group: str, path: tuple[str, ...]) -> EntryPoints:
    """What the packages on the path declare: a file of every one is read, which a configuration would do several times."""
    return entry_points(group=f"textldm.{group}")
