"""From a configuration's sections to an instance of their class, or to one line for every mistake, with what to write instead."""

import ast
import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import keys

ALIKE, ALIKE_IN_ALL = 0.7, 0.88
"""Least likeness (0 to 1) of an unknown key, by its last part or in all, to one that is suggested instead."""
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")

_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None, "null": None}
"""How Python, YAML and people write what JSON writes as true, false and null."""

Kind = TypeVar("Kind")


def check_config(
    kind: type[Kind],
    values: Mapping[str, Any],
    source: str,
    advise: Callable[[str], str] = lambda key: "",
    sections_of_others: bool = False,
) -> Kind:
    """An instance of a pydantic class, from the sections in `values`.

    Args:
        advise: what to do about an unknown key, where more is known than the nearest one; "" otherwise.
        sections_of_others: `values` may hold sections that `kind` lacks, which other programs read.

    Raises: UserError, a line for every mistake: the key, what was found, what was expected, what to write.
    """
    if sections_of_others:
        values = _known_sections(kind, values, source)
    try:  # by way of JSON, in which a list may stand for a tuple even in strict mode
        return TypeAdapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [_explain(kind, problem, source, advise) for problem in error.errors()]
        raise UserError("\n       ".join(dict.fromkeys(problems))) from None


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known dotted key that looks most like `key`; None if none looks like it.

    What counts is the last part, which people remember; where several share it, the whole path decides.
    """

    def likeness(candidate: str) -> tuple[float, float]:
        return _ratio(key.rpartition(".")[2], candidate.rpartition(".")[2]), _ratio(key, candidate)

    best = max(known, key=lambda candidate: sum(likeness(candidate)), default="")
    last, whole = likeness(best)
    return best if last >= ALIKE or whole >= ALIKE_IN_ALL else None


def json_type(value: Any) -> str:
    """JSON's word for a value's type."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _known_sections(kind: Any, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Those that `kind` has. Raises: UserError for one whose name is a misspelling of them."""
    known = kind.__pydantic_fields__
    for key in values.keys() - known.keys():
        near = nearest(key, known.keys() - values.keys())
        if near and _ratio(key, near) >= 0.8:  # another program's section may well look a little like one of ours
            raise UserError(f"unknown key {key} in {source}; the nearest known key is {near}")
    return {key: values[key] for key in known if key in values}


def _explain(kind: Any, problem: Any, source: str, advise: Callable[[str], str]) -> str:
    """One of pydantic's errors as a sentence."""
    key = ".".join(str(part) for part in problem["loc"])
    found = problem["input"]
    if problem["type"] in _UNKNOWN:
        remedy = advise(key)
        if not remedy:
            near = nearest(key, [known.name for known in keys(kind)])
            remedy = f"the nearest known key is {near}" if near else "no known key is like it"
        return f"unknown key {key} in {source}; {remedy}"
    if problem["type"] in _MISSING:
        return f"{key} is missing in {source}; it has no default"
    if problem["type"] == "value_error":  # of a section's own check, which does not know where the section stands
        message = str(problem["ctx"]["error"])
        return f"{source}: {message}" if not key or f"{key}." in message else f"{source}, section {key}: {message}"
    field = next((known for known in keys(kind) if known.name == key), None)
    expected = re.sub(r"^Input should be ", "", problem["msg"])
    advice = ""
    if field is not None and field.is_section:
        expected = "an object, {...}"
    elif field is not None:
        advice = next((f": write {json.dumps(value)}" for value in _fitting(kind, problem["loc"], found)), "")
    shown = json.dumps(found, default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{key} in {source} is {shown} (a JSON {json_type(found)}); expected {expected}{advice}"


def _fitting(kind: Any, location: Sequence[str | int], value: Any) -> Iterator[Any]:
    """What a value that the field at `location` refuses was probably meant to say, such as 1000 by 1e3."""
    for name in location[:-1]:
        kind = kind.__pydantic_fields__[name].annotation
    field = kind.__pydantic_fields__[location[-1]]
    wanted: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    adapter = TypeAdapter(wanted, config=ConfigDict(strict=True, allow_inf_nan=False))
    for other in _readings(value):
        with contextlib.suppress(
            ValueError, TypeError
        ):  # ValidationError is a ValueError; what JSON lacks, a TypeError
            adapter.validate_json(json.dumps(other))
            yield other


def _readings(value: Any) -> Iterator[Any]:
    """What else a value may be meant to say, likeliest first."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower() in _WORDS:
            yield _WORDS[text.lower()]
        yield text.lower()
        for literal in (text, text.replace(",", ""), f"[{text}]"):  # 1_000; 1,000; 0.9,0.95
            try:
                number = ast.literal_eval(literal)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(number, int | float | list | tuple):
                yield number
                yield from _readings(number) if isinstance(number, float) else ()
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    elif value in (0, 1) and not isinstance(value, bool):
        yield bool(value)
    if isinstance(value, bool | int | float):
        yield json.dumps(value)
        yield [value]


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()
