"""Reading a run's configuration: one JSON file, overrides on the command line, and one clear message for every mistake.

    config = load_config("dit_xl", ["train.steps=1000"])       # a path, else a name in configs/
    textldm config dit_xl --set train.steps=1000    # prints every key, its value and its meaning

Relative paths inside a configuration are relative to the working directory. The keys: pretrain/config_schema.py.
"""

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from data_pipeline.core.errors import UserError
from pretrain.config.registry import stage_kind, stage_names
from pretrain.config.schema import RunConfig, with_optimizer
from pretrain.engine.optim import OptimizerSettings, optimizer_kind, optimizer_names

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"

# What decides which rows step s sees and with which noise: changed, the run is no longer the function of (config, data,
# step) that its checkpoints belong to, so no flag overrides them.
IDENTITY = ("stage", "train.seed", "data.rows_per_step", "data.streams")

# What moves no weight (or only by rounding): where things run, how they are sharded, watched and recorded. data.path is
# harmless because the data's fingerprint is compared by itself, as are those of the feature cache and the VAE.
HARMLESS = (
    "about", "telemetry", "deepspeed", "diagnose",
    "data.path", "data.micro_batch_rows", "data.verify", "data.workers", "data.prefetch_steps", "data.cache_dir",
    "data.cache_gigabytes",
    "repa.features", "model.vae",
    "train.run", "train.zero_stage", "train.offload_optimizer", "train.offload_parameters", "train.offload_folder",
    "train.activation_checkpointing", "train.compile", "train.deterministic",
    "train.checkpoint_every", "train.checkpoint_async", "train.keep_last", "train.keep_every", "train.eval_every",
    "train.eval_rows", "train.eval_samples", "train.log_every", "train.watchdog_s", "train.timeout_s", "train.grace_s", "train.max_skips",
    "train.skip_window", "train.rewind",
)  # fmt: skip


class Difference(NamedTuple):
    """A key whose value a resumed run changes; harmless: proceeds by itself, others need `--allow-change key`."""

    key: str
    old: Any
    new: Any
    harmless: bool


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a configuration.

    Args:
        path_or_name: a JSON file, else the name of one in the repository's configs/ (with or without .json).
        overrides: `key=value` with dotted keys; values are JSON, else strings: `train.steps=1000`, `data.path=data/x`.

    Returns: a `VAERun` or a `DiTRun`, train.run filled in.
    Raises: UserError naming the key, what was found and what to do.
    """
    path = _find(path_or_name)
    source = path.name if path.parent == CONFIG_FOLDER else str(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {source}: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{source} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{source} holds a JSON {_json_type(values)}; expected an object with sections (stage, model, data, ...)"
        )
    for override in overrides:
        _set(values, override)
    return parse_config(values, source + (" (with --set)" if overrides else ""), default_name=path.stem)


def parse_config(values: dict[str, Any], source: str, default_name: str = "run") -> RunConfig:
    """Check a dictionary of sections. Messages name `source`; without train.run, the run is runs/<default_name>."""
    stage = values.get("stage")
    if stage not in stage_names():
        found = "is missing" if stage is None else f"is {json.dumps(stage)}"
        raise UserError(f"stage {found} in {source}; expected one of {', '.join(stage_names())}")
    kind = with_optimizer(stage_kind(stage).config, _optimizer_settings(values, source))
    try:  # by way of JSON, in which a list may stand for a tuple even in strict mode
        config = kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_explain(kind, problem, source) for problem in error.errors()]
        raise UserError("\n       ".join(problems)) from None
    config.train.run = config.train.run or f"runs/{default_name}"
    return config


def _optimizer_settings(values: dict[str, Any], source: str) -> type[OptimizerSettings]:
    section = values.get("optimizer")
    name = section.get("kind", "adamw") if isinstance(section, dict) else "adamw"
    if name not in optimizer_names():
        raise UserError(
            f"optimizer.kind in {source} is {json.dumps(name)}; expected one of {', '.join(optimizer_names())}"
        )
    return optimizer_kind(name).Settings


def check_ranks(config: RunConfig, world_size: int) -> None:
    """Raise UserError, with the possible numbers, when so many ranks cannot share out the streams evenly."""
    streams = config.data.streams
    if streams % world_size:
        usable = ", ".join(str(n) for n in range(1, streams + 1) if streams % n == 0)
        raise UserError(f"{world_size} ranks cannot share data.streams {streams} evenly; possible are {usable}")


def micro_batch_size(config: RunConfig, world_size: int = 1, at_most: int | None = None) -> int:
    """Rows of a training micro-batch: the largest divisor of a rank's rows a step within data.micro_batch_rows and `at_most`."""
    rank_rows = config.data.rows_per_step // world_size
    most = min(config.data.micro_batch_rows, at_most or rank_rows, rank_rows)
    return next(rows for rows in range(most, 0, -1) if rank_rows % rows == 0)


def resume_differences(old: RunConfig | Mapping[str, Any], new: RunConfig) -> list[Difference]:
    """The keys in which two configurations differ, and whether a resumed run may change each without being told so.

    `old` may be a dump of an earlier version's configuration; a key that one of the two lacks counts as None there.
    """
    old = old.model_dump(mode="json") if isinstance(old, RunConfig) else old
    before, after = dict(flatten(old)), dict(flatten(new.model_dump(mode="json")))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    # A cosine's every step depends on where it ends; a constant rate does not, and wsd is made to be prolonged.
    harmless = (*HARMLESS, "train.steps") if new.schedule.kind != "cosine" else HARMLESS
    return [Difference(key, before.get(key), after.get(key), _under(key, harmless)) for key in keys]


def refuse_changes(differences: Sequence[Difference], allowed: Collection[str], run: str | Path) -> None:
    """Raise UserError when a resumed run changes the order of the data, or another key without leave."""
    fixed = [d for d in differences if _under(d.key, IDENTITY)]
    if fixed:
        changes = "; ".join(f"{d.key} was {json.dumps(d.old)}, is {json.dumps(d.new)}" for d in fixed)
        raise UserError(
            f"{run} cannot resume: {changes}. This decides which rows and noise every step sees: set it back, name"
            " another folder with --run, or start over with --fresh"
        )
    refused = [d for d in differences if not d.harmless and not _under(d.key, allowed)]
    if refused:
        changes = "; ".join(f"{d.key} was {json.dumps(d.old)}, is {json.dumps(d.new)}" for d in refused)
        flags = " ".join(f"--allow-change {d.key}" for d in refused)
        raise UserError(f"{run} cannot resume with another configuration: {changes}. If that is meant, add {flags}")


def _find(path_or_name: str | Path) -> Path:
    candidates = [Path(path_or_name), CONFIG_FOLDER / path_or_name, CONFIG_FOLDER / f"{path_or_name}.json"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
    near = difflib.get_close_matches(Path(path_or_name).stem, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"no configuration {path_or_name}: neither a file nor one of configs/ ({', '.join(names)}){hint}")


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value with a dotted key, e.g. --set train.steps=1000")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section} is not a section, but a JSON {_json_type(values)}")
    values[leaf] = value


def _explain(kind: type[RunConfig], problem: Any, source: str) -> str:
    """One pydantic error as a sentence."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        others = [name for name in stage_names() if key in stage_kind(name).config.__pydantic_fields__]
        if others:
            return f"section {key} in {source} belongs to stage {' or '.join(others)}; drop it, or change stage"
        near = nearest(key, [known for known, _, _ in describe(kind)])
        return f"unknown key {key} in {source}; the nearest known key is {near}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing in {source}; it has no default"
    if problem["type"] == "value_error":
        return f"{source}: {problem['ctx']['error']}"
    expected = re.sub(r"^Input should be ", "", problem["msg"])
    found = json.dumps(problem["input"], default=str)
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{key} in {source} is {found} (a JSON {_json_type(problem['input'])}); expected {expected}"


def nearest(key: str, known: Sequence[str]) -> str:
    """The known dotted key most like `key`, by the whole path or by its last part."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        leaf = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + leaf

    return max(known, key=likeness)


def describe(kind: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key below a section as (dotted key, type, meaning)."""
    for name, field in kind.__pydantic_fields__.items():
        nested = field.annotation
        if inspect.isclass(nested) and (issubclass(nested, BaseModel) or dataclasses.is_dataclass(nested)):
            yield from describe(nested, f"{prefix}{name}.")
        else:
            meaning = field.description or _attribute_doc(kind, name)
            yield prefix + name, inspect.formatannotation(nested).replace("typing.", ""), " ".join(meaning.split())


def _attribute_doc(kind: type, name: str) -> str:
    """A field's line in the "Attributes:" part of a plain dataclass's docstring."""
    for base in kind.__mro__:
        for line in (inspect.getdoc(base) or "").splitlines():
            names, colon, meaning = line.strip().partition(": ")
            if colon and name in names.split(", "):
                return meaning
    return ""


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _under(key: str, prefixes: Collection[str]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def _json_type(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")
