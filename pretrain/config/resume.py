"""What a resumed run may change. A key says so itself, by `OnResume` in its field's metadata; here that is read and enforced."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import OnResume, flatten, keys
from pretrain.config.schema import RunConfig


class Difference(NamedTuple):
    """A key whose value a resumed run changes, and whether it may; None: only with `--allow-change key`."""

    key: str
    old: Any
    new: Any
    on_resume: OnResume | None


def on_resume(kind: type[RunConfig]) -> dict[str, OnResume | None]:
    """Every key and section of a configuration's class, with its own mark or else that of the section around it."""
    return {key.name: next((mark for mark in key.marks if isinstance(mark, OnResume)), None) for key in keys(kind)}


def resume_differences(old: RunConfig | Mapping[str, Any], new: RunConfig) -> list[Difference]:
    """The keys in which two configurations differ, and whether a resumed run may change each.

    `old` may be a dump of an earlier version's configuration; a key that one of the two lacks counts as None there.
    """
    old = old.told() if isinstance(old, RunConfig) else old
    before, after = dict(flatten(old)), dict(flatten(new.told()))
    marks = on_resume(type(new)) | dict.fromkeys(new.free_on_resume(), OnResume.FREE)
    changed = [key for key in before | after if before.get(key) != after.get(key)]
    return [Difference(key, before.get(key), after.get(key), _mark_of(key, marks)) for key in changed]


def refuse_changes(differences: Sequence[Difference], allowed: Collection[str], run: str | Path) -> None:
    """Raise UserError when a resumed run changes the order of the data, or another key without leave."""
    fixed = [d for d in differences if d.on_resume is OnResume.NEVER]
    if fixed:
        raise UserError(
            f"{run} cannot resume: {_changes(fixed)}. This decides which rows and noise every step sees: set it back,"
            " name another folder with --run, or start over with --fresh"
        )
    refused = [d for d in differences if d.on_resume is None and not any(_is_in(d.key, key) for key in allowed)]
    if refused:
        flags = " ".join(f"--allow-change {d.key}" for d in refused)
        raise UserError(
            f"{run} cannot resume with another configuration: {_changes(refused)}. If that is meant, add {flags}"
        )


def _mark_of(key: str, marks: Mapping[str, OnResume | None]) -> OnResume | None:
    """What a key's field says of changes on resuming; of a key inside a free-form section (deepspeed), what the section says."""
    while key and key not in marks:
        key = key.rpartition(".")[0]
    return marks.get(key)


def _is_in(key: str, section: str) -> bool:
    return key == section or key.startswith(section + ".")


def _changes(differences: Sequence[Difference]) -> str:
    return "; ".join(f"{d.key} was {json.dumps(d.old)}, is {json.dumps(d.new)}" for d in differences)
