"""What others wrote has a grammar, a size and a depth before it is believed."""

import io
import json

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import DEEPEST, FILE, HOST, VARIABLE, WORD, named, parse_json, read_at_most


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        (HOST, ["node01", "me@node-1.x:22", "10.0.0.1"], ["-oX", "a b", "a;b", "", "a\n", "ho\u0455t", "$(x)"]),
        (VARIABLE, ["A", "_a1"], ["1a", "a-b", "a b", "", "A\n", "\u0410", "a;b"]),
        (FILE, ["a.tar", "data-00000-of-00001.arrow"], ["../a", "a/b", ".a", "-a", "", "/a", "a\n"]),
        (WORD, ["a=b", "x/y,z"], ["a b", "a;b", "", "$a", "a\n"]),
    ],
)
def test_grammars_take_all_of_a_name_or_nothing(pattern, right: list[str], wrong: list[str]) -> None:
    for name in right:
        assert named(pattern, name, "the name", "mend it") == name
    for name in wrong:
        with pytest.raises(UserError, match=r"^the name is .*: mend it$"):
            named(pattern, name, "the name", "mend it")


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":[1,'])
def test_json_has_a_depth_and_all_that_is_wrong_is_a_value_error(opening: str) -> None:
    for text in (opening * 100_000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "", "1" * 5000, b"\xff"):
        with pytest.raises(ValueError):  # noqa: PT011 (of json or of ours)
            parse_json(text)
    value = {"a": [1, {"b": None}], "c": "x"}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) == json.loads("[" * DEEPEST + "]" * DEEPEST)


def test_reading_stops_at_the_bound() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    endless = Endless()
    with pytest.raises(ValueError, match="more than the 3,000,000 bytes"):
        read_at_most(endless, 3_000_000)
    assert endless.given == 3_000_001
    assert read_at_most(io.BytesIO(b"abc"), 3) == b"abc"
