"""Sections of a configuration: their keys with meanings and marks, wherever the class that holds them comes from."""

import dataclasses
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass as pydantic_dataclass

from data_pipeline.core.settings import STRICT, OnResume, Section, flatten, keys, type_name


@dataclasses.dataclass(kw_only=True)
class Shape:
    """A plain class.

    Attributes:
        width, depth: sizes.
    """

    width: int = 4
    depth: int = 2


@pydantic_dataclass(config=STRICT, kw_only=True)
class Model(Shape):
    """One that a configuration holds."""

    vae: Annotated[str, OnResume.FREE]
    """Of the
    model."""


class Speed(Section):
    """Numbers."""

    steps: Annotated[PositiveInt, OnResume.NEVER] = 3
    """Steps."""
    rate: float = 1.0
    """Rate."""


class Run(Section):
    """All of it."""

    stage: Annotated[str, OnResume.NEVER]
    """Which."""
    speed: Annotated[Speed, OnResume.FREE] = Speed()
    """Numbers."""
    model: Model
    """Sizes."""
    rest: dict[str, Any] = Field(default_factory=dict)
    """Anything."""


class OneRun(Run):
    """A stage's own."""

    stage: Literal["one"]
    """Which one."""


def test_keys_have_meanings_and_types() -> None:
    found = {key.name: key for key in keys(OneRun)}
    assert list(found) == [
        "stage", "speed", "speed.steps", "speed.rate", "model", "model.width", "model.depth", "model.vae", "rest",
    ]  # fmt: skip
    assert found["model.depth"].meaning == "sizes."
    assert found["model.vae"].meaning == "Of the model."
    assert found["stage"].meaning == "Which one."
    assert [name for name, key in found.items() if key.is_section] == ["speed", "model"]
    assert [type_name(found[name].kind) for name in ("speed.steps", "stage")] == ["int", "Literal['one']"]


def test_marks_are_a_keys_own_before_those_around_it_and_outlive_a_narrower_type() -> None:
    marks = {key.name: [mark for mark in key.marks if isinstance(mark, OnResume)] for key in keys(OneRun)}
    assert marks["speed.steps"] == [OnResume.NEVER, OnResume.FREE]
    assert marks["speed.rate"] == [OnResume.FREE]
    assert marks["stage"] == [OnResume.NEVER]
    assert marks["model.vae"] == [OnResume.FREE]
    assert marks["model.width"] == marks["rest"] == []


def test_flattening_gives_every_value_by_its_key() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {}}, "d": [1]})) == {"a.b": 1, "d": [1]}


@pytest.mark.parametrize("values", [{"steps": 1.0}, {"steps": True}, {"rate": float("inf")}, {"other": 1}])
def test_sections_are_strict(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Speed"):
        Speed(**values)
