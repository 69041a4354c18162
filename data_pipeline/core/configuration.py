"""Reading a configuration: a JSON file, what it is based on, overrides of single keys, and one line for every mistake.

    raw = read_config("dit_l", ["train.steps=1000"])          # a path, else a name in configs/
    config = check_config(RunConfig, raw.values, raw.source)  # any pydantic class

{"base": "dit_b", "model": {"width": 1024}} is dit_b with one key changed; bases may have bases. Which sections there are is
the business of who reads (pretrain/config, cache_features.py).
"""

import ast
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.errors import UserError
from data_pipeline.core.mistakes import json_type
from data_pipeline.core.outside import parse_json, read_at_most
from data_pipeline.core.storage import open_file

CONFIG_FOLDER = Path(__file__).resolve().parents[2] / "configs"
BASE = "base"
"""The key of a file that names the configuration whose differences it holds."""


class RawConfig(NamedTuple):
    """A configuration before anything is known of its sections.

    values: bases merged, overrides applied. source: what messages call it. name: of its file, without .json.
    """

    values: dict[str, Any]
    source: str
    name: str


Inherited = Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any]]
"""Called with the values of a base and those that are put over them; what is taken of the base."""


def read_config(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    not_inherited: Sequence[str] = (),
    whole: bool = False,
    inherited: Inherited = lambda below, above: below,
) -> RawConfig:
    """Read a file and its bases and apply overrides.

    Args:
        path_or_name: a JSON file, else the name of one in the repository's configs/ (with or without .json).
        overrides: `key=value` with dotted keys; values are JSON, else strings: `train.steps=1000`, `data.path=data/x`.
        not_inherited: dotted keys that belong to one file alone, and are not taken from a base.
        whole: refuse a base, which names another file: this one is a program's, or somebody else's.
        inherited: what is taken of a base, and of a file under its overrides, where that depends on what is put over it.

    Raises: UserError.
    """
    path = find_config(path_or_name)
    values, bases = (_parse(path), []) if whole else _with_bases(path, not_inherited, inherited, ())
    if BASE in values:
        raise UserError(
            f"{_shown(path)} has a {BASE!r}, which a run's own configuration never has: put the run's own file back"
        )
    given: dict[str, Any] = {}
    for override in overrides:
        _set(given, override)
    values = inherited(values, given)
    for override in overrides:
        _set(values, override)
    notes = [f"based on {', '.join(bases)}"] * bool(bases) + ["with --set"] * bool(overrides)
    source = _shown(path) + (f" ({', '.join(notes)})" if notes else "")
    return RawConfig(values, source, path.stem)


def find_config(path_or_name: str | Path, beside: Path | None = None) -> Path:
    """The file: a path, else a name in configs/. A base is first looked for beside the file that names it, `beside`.

    Raises: UserError with the nearest name.
    """
    folders = [beside.parent] if beside else []
    candidates = [Path(path_or_name)] if beside is None else []
    candidates += [folder / f"{path_or_name}{end}" for folder in (*folders, CONFIG_FOLDER) for end in ("", ".json")]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if found:  # a file that is named like its base shall not be its own
        return next((path for path in found if beside is None or not path.samefile(beside)), found[0])
    names = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))
    near = difflib.get_close_matches(Path(path_or_name).stem, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    by = f" (the base of {_shown(beside)})" if beside else ""
    raise UserError(
        f"no configuration {path_or_name}{by}: neither a file nor one of configs/ ({', '.join(names)}){hint}"
    )


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put over it, section by section."""
    both = {
        key for key in base.keys() & over.keys() if isinstance(base[key], Mapping) and isinstance(over[key], Mapping)
    }
    return {**base, **over, **{key: merged(base[key], over[key]) for key in both}}


def _with_bases(
    path: Path, not_inherited: Sequence[str], inherited: Inherited, above: tuple[Path, ...]
) -> tuple[dict[str, Any], list[str]]:
    """The values of a file over those of its base, and the names of its bases, nearest first."""
    if any(path.samefile(other) for other in above):
        circle = " -> ".join(_shown(file) for file in (*above, path))
        raise UserError(f"{_shown(path)} is based on itself: {circle}; take {BASE!r} out of one of them")
    values = _parse(path)
    base = values.pop(BASE, None)
    if base is None:
        return values, []
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{BASE} in {_shown(path)} is {json.dumps(base)}; expected the name or path of another configuration"
        )
    below, names = _with_bases(found := find_config(base, beside=path), not_inherited, inherited, (*above, path))
    for key in not_inherited:
        *sections, leaf = key.split(".")
        section: Any = below
        for name in sections:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(leaf, None)
    return merged(inherited(below, values), values), [_shown(found), *names]


def _parse(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: UserError."""
    shown = _shown(path)
    try:
        with open_file(path) as file:
            text = read_at_most(file).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {shown}: {error}") from None
    try:
        values = parse_json(text, _without_repeats)
    except json.JSONDecodeError as error:
        where = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise UserError(f"{shown} is not JSON: {where}{_json_advice(path, text, error.pos)}") from None
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    except ValueError as error:
        raise UserError(f"{shown} is no configuration: {error}") from None
    if not isinstance(values, dict):
        raise UserError(
            f"{shown} holds a JSON {json_type(values)}; expected an object with sections (stage, model, data, ...)"
        )
    return values


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    repeated = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if repeated:  # JSON itself would silently take the last
        raise UserError(f"the key {repeated[0]} stands twice in one section; keep one of them")
    return dict(pairs)


def _json_advice(path: Path, text: str, position: int) -> str:
    """What to write instead of that which ended the JSON reader."""
    before, rest = text[:position].rstrip(), text[position:].lstrip()
    word = re.match(r"\w*", rest)[0]  # type: ignore[index]
    if not text.strip():
        return "; the file is empty"
    if path.suffix in (".yaml", ".yml", ".toml") or not text.lstrip().startswith("{"):
        return '; a configuration is a JSON file: {"stage": "vae", "data": {"path": "data/owt2", ...}, ...}'
    if not rest:
        return "; something is not closed: } or ] or a quotation mark is missing"
    if before.endswith(",") and rest[0] in "}],":
        return "; drop the comma before it"
    if rest[0] == "," and rest[1:].lstrip()[:1] in tuple("}],"):  # where the reader itself blames the comma
        return "; drop this comma"
    if word in ("True", "False", "None"):
        return f"; JSON writes {json.dumps(ast.literal_eval(word))}"
    if rest[0] == "'":
        return "; JSON writes texts and keys in double quotation marks"
    if rest.startswith(("//", "#", "/*")):
        return "; JSON has no comments: section about has room for words"
    if re.match(r"[\w.+-]", rest) and before[-1:] in (":", "[", ","):
        return "; texts stand in double quotation marks, numbers as 1000, 0.5 or 1e-4"
    if rest[0] == '"' and before[-1:] not in (",", ":", "{", "["):
        return "; put a comma before it"
    return ""


def _set(values: dict[str, Any], override: str) -> None:
    """Apply one `key=value`."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value with a dotted key, e.g. --set train.steps=1000")
    if key == BASE:
        raise UserError(f"--set {override}: a base stands in a file; name another one with --config")
    if text == "None":  # else it would be a text that many keys take
        raise UserError(f'--set {override}: JSON writes null; the text is written "None", in quotation marks')
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    *sections, leaf = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(f"--set {override}: {section} is not a section, but a JSON {json_type(values)}")
    values[leaf] = value


def _shown(path: Path) -> str:
    return path.name if path.parent == CONFIG_FOLDER else str(path)
