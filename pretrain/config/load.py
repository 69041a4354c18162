"""A run's configuration from its file, for its stage.

    config = load_config("dit_xl", ["train.steps=1000"])       # a path, else a name in configs/

Relative paths inside a configuration are relative to the working directory. Files, bases, overrides:
data_pipeline/core/configuration.py. The keys: schema.py, and the stages.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from data_pipeline.core.configuration import read_config
from data_pipeline.core.errors import UserError
from data_pipeline.core.mistakes import check_config
from data_pipeline.core.settings import Key, keys
from pretrain.config.registry import known_kinds, stage_kind, stage_names
from pretrain.config.schema import RunConfig, with_optimizer
from pretrain.config.synonyms import ours
from pretrain.engine.optimizer_settings import OptimizerSettings, optimizer_names, optimizer_settings

NOT_INHERITED = ("about", "train.run")
"""What names and describes one run is not taken from its configuration's base."""


def load_config(path_or_name: str | Path, overrides: Sequence[str] = (), whole: bool = False) -> RunConfig:
    """Read, override and check a configuration.

    Args:
        path_or_name: a JSON file, else the name of one in the repository's configs/ (with or without .json).
        overrides: `key=value` with dotted keys; values are JSON, else strings: `train.steps=1000`, `data.path=data/x`.
        whole: refuse a base, as `read_config`.

    Returns: an instance of the stage's class, train.run filled in.
    Raises: UserError naming the key, what was found and what to do.
    """
    raw = read_config(path_or_name, overrides, NOT_INHERITED, whole, _inherited)
    return parse_config(raw.values, raw.source, default_name=raw.name)


def parse_config(values: Mapping[str, Any], source: str, default_name: str = "run") -> RunConfig:
    """Check a dictionary of sections. Messages name `source`; without train.run, the run is runs/<default_name>."""
    stage = values.get("stage")
    if stage not in stage_names():
        found = "is missing" if stage is None else f"is {json.dumps(stage)}"
        raise UserError(f"stage {found} in {source}; expected one of {', '.join(stage_names())}")
    kind = with_optimizer(stage_kind(stage).config, _optimizer_settings(values, source))
    config = check_config(kind, values, source, lambda key: _advice(key, kind))
    config.train.run = config.train.run or f"runs/{default_name}"
    return config


def _inherited(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A base without the keys that its optimizer alone knows, where another one is named above it."""
    section, over = below.get("optimizer"), above.get("optimizer")
    if not isinstance(section, dict) or not isinstance(over, Mapping) or "kind" not in over:
        return below
    kinds = _optimizer_name(below), _optimizer_name(above)
    if not all(name in optimizer_names() for name in kinds):
        return below  # which is told of the whole
    known, wanted = (optimizer_settings(name).__pydantic_fields__.keys() for name in kinds)
    return below | {"optimizer": {key: value for key, value in section.items() if key not in known - wanted}}


def _optimizer_name(values: Mapping[str, Any]) -> Any:
    section = values.get("optimizer")
    return section.get("kind", "adamw") if isinstance(section, Mapping) else "adamw"


def _optimizer_settings(values: Mapping[str, Any], source: str) -> type[OptimizerSettings]:
    """The section of the optimizer that `optimizer.kind` names. Raises: UserError."""
    name = _optimizer_name(values)
    if name not in optimizer_names():
        raise UserError(
            f"optimizer.kind in {source} is {json.dumps(name)}; expected one of {', '.join(optimizer_names())}"
        )
    return optimizer_settings(name)


def _advice(key: str, kind: type[RunConfig]) -> str:
    """What to do about a key that a stage does not know: another stage has it as a section, or others call one of ours so."""
    others = [name for name, known in known_kinds().items() if key in known.config.__pydantic_fields__]
    if others:
        return f"section {key} belongs to stage {' or '.join(others)}: drop it, or change stage"
    found = {known.name: known for known in keys(kind)}
    here = [f"{own} ({_in_short(found[own])})" for own in ours(key, found)]
    return f"here that is {' or '.join(here)}" if here else ""


def _in_short(key: Key) -> str:
    """A key in a few words: the values it may have if they are few, else the first sentence of its meaning."""
    choices = [json.dumps(choice) for choice in get_args(key.kind)] if get_origin(key.kind) is Literal else []
    return ", ".join(choices) or key.meaning.split(". ")[0].rstrip(".")
