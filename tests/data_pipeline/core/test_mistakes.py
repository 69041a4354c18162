"""A configuration's mistakes as sentences, for any pydantic class: what was found, what was expected, what to write."""

import dataclasses
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass

from data_pipeline.core.errors import UserError
from data_pipeline.core.mistakes import check_config, nearest
from data_pipeline.core.settings import STRICT, Section


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

    name: str
    """Of the model."""


class Speed(Section):
    """Numbers."""

    rate: PositiveFloat = 1.0
    """Rate."""
    steps: PositiveInt = 3
    """Steps."""
    fast: bool = False
    """Fast."""
    kind: Literal["slow", "fast"] = "slow"
    """Kind."""
    cap: float | None = None
    """Cap."""
    betas: tuple[float, float] = (0.5, 0.5)
    """Betas."""

    @model_validator(mode="after")
    def _check(self) -> "Speed":
        if self.rate > 100:
            raise ValueError(f"rate is {self.rate:g}; at most 100")
        return self


class Whole(Section):
    """All of it."""

    speed: Speed = Speed()
    """Numbers."""
    model: Model
    """Sizes."""
    rest: Annotated[dict[str, Any], Field(max_length=2)] = Field(default_factory=dict)
    """Anything."""


def mistake(values: dict[str, Any], **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        check_config(Whole, {"model": {"name": "x"}} | values, "x.json", **options)
    return str(raised.value)


def test_what_is_right_becomes_an_instance() -> None:
    config = check_config(Whole, {"model": {"name": "x", "width": 8}, "speed": {"betas": [0.1, 0.2]}}, "x.json")
    assert (config.model.width, config.speed.betas) == (8, (0.1, 0.2))


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        ({"fast": "True"}, 'is "True" (a JSON string); expected a valid boolean: write true'),
        ({"fast": "no"}, "write false"),
        ({"fast": 1}, "is 1 (a JSON integer); expected a valid boolean: write true"),
        ({"steps": 1e3}, "is 1000.0 (a JSON number); expected a valid integer: write 1000"),
        ({"steps": "1_000"}, "write 1000"),
        ({"steps": "1,000"}, "write 1000"),
        ({"steps": "1000"}, "write 1000"),
        ({"steps": True}, "is true (a JSON boolean); expected a valid integer"),
        ({"rate": "1e-3"}, "write 0.001"),
        ({"cap": "none"}, "write null"),
        ({"kind": "Fast"}, "expected 'slow' or 'fast': write \"fast\""),
        ({"betas": "0.9, 0.95"}, "write [0.9, 0.95]"),
        ({"betas": [0.9]}, "speed.betas.1 is missing"),
        ({"rate": "quick"}, 'speed.rate in x.json is "quick" (a JSON string); expected a valid number'),
        ({"rate": float("nan")}, "finite number"),
        ({"rate": 101}, "x.json, section speed: rate is 101; at most 100"),
        ({"steps": 0}, "expected greater than 0"),
        ({"kind": "x" * 500}, "x..."),
    ],
)
def test_values_of_another_kind(speed: dict[str, Any], expected: str) -> None:
    message = mistake({"speed": speed})
    assert expected in message
    assert len(message) < 300


@pytest.mark.parametrize(
    "speed", [{"steps": 2.5}, {"rate": "quick"}, {"steps": "-1"}, {"steps": "[{1}]"}, {"kind": "other"}]
)
def test_nothing_is_advised_that_would_be_refused_too(speed: dict[str, Any]) -> None:
    assert "write" not in mistake({"speed": speed})


def test_numbers_where_texts_are_expected() -> None:
    assert 'expected a valid string: write "7"' in mistake({"model": {"name": 7}})


@pytest.mark.parametrize("values", [{"model": 3}, {"speed": [1]}, {"speed": None}])
def test_sections_that_are_none(values: dict[str, Any]) -> None:
    assert "expected an object, {...}" in mistake(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"speed": {"stesp": 1}}, "unknown key speed.stesp in x.json; the nearest known key is speed.steps"),
        ({"sped": {"rate": 1}}, "the nearest known key is speed"),
        ({"steps": 1}, "the nearest known key is speed.steps"),
        ({"model": {"name": "x", "widht": 1}}, "the nearest known key is model.width"),
        ({"speed": {"colour": 1}}, "unknown key speed.colour in x.json; no known key is like it"),
        ({"batch": 1}, "no known key is like it"),
    ],
)
def test_unknown_keys(values: dict[str, Any], expected: str) -> None:
    assert expected in mistake(values)


def test_who_knows_more_of_a_key_says_so() -> None:
    assert mistake({"velocity": 1}, advise=lambda key: f"{key} is a speed") == (
        "unknown key velocity in x.json; velocity is a speed"
    )


def test_every_mistake_has_its_line() -> None:
    message = mistake({"speed": {"rate": "x", "steps": "y"}, "model": {}})
    assert [line.split()[0] for line in message.splitlines()] == ["speed.rate", "speed.steps", "model.name"]


def test_sections_of_other_programs_are_theirs_unless_misspelt() -> None:
    check = {"kind": Whole, "source": "x.json", "sections_of_others": True}
    assert check_config(values={"model": {"name": "x"}, "train": {"y": 1}}, **check).model.name == "x"
    with pytest.raises(UserError, match=r"unknown key sped in x\.json; the nearest known key is speed"):
        check_config(values={"model": {"name": "x"}, "sped": {}}, **check)
    with pytest.raises(UserError, match=r"unknown key speed\.stesp"):
        check_config(values={"model": {"name": "x"}, "speed": {"stesp": 1}}, **check)


def test_the_nearest_key_is_like_the_one_that_was_written() -> None:
    known = ["optimizer.lr", "data.streams", "data.path", "train.steps", "train.watchdog_s"]
    assert [nearest(key, known) for key in ("lr", "data.stream", "trian.steps")] == [
        "optimizer.lr",
        "data.streams",
        "train.steps",
    ]
    assert [nearest(key, known) for key in ("batch_size", "train.x", "optimizer.foo", "")] == [None] * 4
    assert nearest("x", []) is None
