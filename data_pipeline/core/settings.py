"""What every section of a configuration is made of, wherever it lives: a section stands beside what it configures."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the configuration. Unknown keys, wrong types and non-finite numbers are errors."""

    model_config = STRICT


class OnResume(Enum):
    """Whether a resumed run may change a key: metadata of the field, `Annotated[int, OnResume.FREE]`. Without it: only by leave."""

    FREE = "moves no weight, or only by rounding: where things run, how they are sharded, watched and recorded"
    NEVER = "decides which rows and noise a step sees: the run would no longer be the function that its checkpoints belong to"


class Key(NamedTuple):
    """A key that a class of sections knows; `name` is dotted. `marks`: metadata, its own before those of the sections around it."""

    name: str
    kind: Any
    meaning: str
    marks: tuple[Any, ...]
    is_section: bool


def keys(kind: Any, prefix: str = "", marks: tuple[Any, ...] = ()) -> Iterator[Key]:
    """Every key below a section, sections before what they hold."""
    for name, field in kind.__pydantic_fields__.items():
        own = _marks(kind, name)
        meaning = field.description or _attribute_doc(kind, name)
        is_section = _is_section(field.annotation)
        yield Key(prefix + name, field.annotation, " ".join(meaning.split()), own + marks, is_section)
        if is_section:
            yield from keys(field.annotation, f"{prefix}{name}.", own + marks)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no section."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def type_name(kind: Any) -> str:
    """A field's type as people write it."""
    return inspect.formatannotation(kind).replace("typing.", "")


def _is_section(annotation: Any) -> bool:
    return inspect.isclass(annotation) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation))


def _marks(kind: type, name: str) -> tuple[Any, ...]:
    """A field's metadata, and what it overrides had: a narrower type keeps the marks."""
    found: list[Any] = []
    for base in kind.__mro__:
        field = base.__dict__.get("__pydantic_fields__", {}).get(name)
        found += [mark for mark in (field.metadata if field is not None else ()) if mark not in found]
    return tuple(found)


def _attribute_doc(kind: type, name: str) -> str:
    """A field's line in the "Attributes:" part of a plain dataclass's docstring."""
    for base in kind.__mro__:
        for line in (inspect.getdoc(base) or "").splitlines():
            names, colon, meaning = line.strip().partition(": ")
            if colon and name in names.split(", "):
                return meaning
    return ""
