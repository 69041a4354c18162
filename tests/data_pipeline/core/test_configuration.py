"""Configuration files: where they are looked for, what they inherit, and what is said of one that is no JSON."""

import json
from pathlib import Path

import pytest

from data_pipeline.core.configuration import CONFIG_FOLDER, find_config, merged, read_config
from data_pipeline.core.errors import UserError


def write(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def test_a_config_says_how_it_differs_from_its_base(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"x": {"p": 1, "q": [1, 2], "r": {"s": 1, "t": 2}}, "y": 1})
    write(tmp_path / "b.json", {"base": "a", "x": {"q": [3], "r": {"t": 5}}})
    write(tmp_path / "deep" / "c.json", {"base": "../b.json", "x": {"p": None}, "z": {}})
    raw = read_config(tmp_path / "deep" / "c.json", ["x.r.s=9"])
    assert raw.values == {"x": {"p": None, "q": [3], "r": {"s": 9, "t": 5}}, "y": 1, "z": {}}
    assert raw.name == "c"
    assert "b.json, " in raw.source
    assert raw.source.endswith("a.json, with --set)")


def test_what_belongs_to_one_file_is_not_inherited(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"about": {"purpose": "a"}, "train": {"run": "runs/a", "steps": 1}, "data": 3})
    write(tmp_path / "b.json", {"base": "a", "train": {"seed": 1}})
    own = ("about", "train.run", "data.path", "none.such")
    assert read_config(tmp_path / "b.json", (), own).values == {"train": {"steps": 1, "seed": 1}, "data": 3}
    assert read_config(tmp_path / "a.json", (), own).values["train"]["run"] == "runs/a"


def test_a_base_is_beside_the_file_or_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine" / "dit_b.json", {"base": "dit_b", "stage": "mine"})  # of the shipped one of the same name
    write(tmp_path / "mine" / "dit_l.json", {"stage": "my own dit_l"})
    write(tmp_path / "mine" / "x.json", {"base": "dit_l"})
    write(tmp_path / "dit_l.json", {"stage": "of the working directory"})
    monkeypatch.chdir(tmp_path)
    assert (
        read_config("mine/dit_b.json").values["data"] == json.loads((CONFIG_FOLDER / "dit_b.json").read_text())["data"]
    )
    assert read_config("mine/x.json").values == {"stage": "my own dit_l"}
    assert find_config("dit_l.json") == Path("dit_l.json")
    assert find_config("dit_xl") == CONFIG_FOLDER / "dit_xl.json"


def test_circles_of_bases_are_refused(tmp_path: Path) -> None:
    files = {
        name: write(tmp_path / f"{name}.json", {"base": base}) for name, base in (("a", "b"), ("b", "c"), ("c", "a"))
    }
    with pytest.raises(
        UserError, match=r"a\.json is based on itself: \S+a\.json -> \S+b\.json -> \S+c\.json -> \S+a\.json"
    ):
        read_config(files["a"])
    with pytest.raises(UserError, match=r"own\.json is based on itself"):
        read_config(write(tmp_path / "own.json", {"base": "own"}))


@pytest.mark.parametrize(
    ("base", "expected"),
    [(3, "expected the name or path"), ("", "expected the name or path"), ("dit_x1", "did you mean dit_xl")],
)
def test_a_base_that_is_none_is_named(tmp_path: Path, base: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as raised:
        read_config(write(tmp_path / "x.json", {"base": base}))
    assert "x.json" in str(raised.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": {"b": 1,}}', "drop the comma"),
        ('{"a": [1, 2,]}', "drop the comma"),
        ('{\n "a": true,\n}', "drop the comma"),
        ('{"a": True}', "JSON writes true"),
        ('{"a": [1, False]}', "JSON writes false"),
        ('{"a": None}', "JSON writes null"),
        ("{'a': 1}", "double quotation marks"),
        ("{\"a\": 'x'}", "double quotation marks"),
        ('{"a": 1 // one\n}', "JSON has no comments"),
        ('{"a": 1, # one\n "b": 2}', "JSON has no comments"),
        ('{"a": .5}', "numbers as 1000, 0.5 or 1e-4"),
        ('{"a": runs/x}', "texts stand in double quotation marks"),
        ('{"a": 1 "b": 2}', "put a comma before it"),
        ('{"a": {"b": 1}', "something is not closed"),
        ("", "the file is empty"),
        ("stage: vae\ndata:\n  path: x\n", "a configuration is a JSON file"),
        ("# a comment\nstage: vae\n", "a configuration is a JSON file"),
        ('[data]\npath = "x"\n', "a configuration is a JSON file"),
        ("[1, 2]", "expected an object with sections"),
        ('{"a": {"b": 1, "b": 2}}', "b stands twice"),
        ("[" * 100_000, "nested more than 100 deep"),
    ],
)
def test_what_is_no_json_is_said_with_what_to_write(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as raised:
        read_config(write(tmp_path / "bad.json", text))
    assert "bad.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert read_config(write(tmp_path / "x.json", '\ufeff{"a": 1}')).values == {"a": 1}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(UserError, match=r"cannot read .*latin\.json"):
        read_config(tmp_path / "latin.json")
    with pytest.raises(UserError, match="did you mean vae_base"):
        read_config("vae_bas")
    with pytest.raises(UserError, match="neither a file nor one of configs/"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("a.b=1e-3", {"a": {"b": 0.001}}),
        ("a.b=data/x", {"a": {"b": "data/x"}}),
        ('a.b="1"', {"a": {"b": "1"}}),
        ("a.b=", {"a": {"b": ""}}),
        ("a.b=x=y", {"a": {"b": "x=y"}}),
        ("a.b=[1, {}]", {"a": {"b": [1, {}]}}),
        ("c=null", {"a": {}, "c": None}),
    ],
)
def test_overrides_are_json_else_text(tmp_path: Path, override: str, values: dict) -> None:
    assert read_config(write(tmp_path / "x.json", {"a": {}}), [override]).values == values


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a", "expected key=value"),
        ("=1", "expected key=value"),
        ("a.b.c=1", "b is not a section, but a JSON integer"),
        ("base=dit_b", "a base stands in a file"),
        ("a.b=None", "JSON writes null"),
    ],
)
def test_overrides_that_are_none_are_named(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read_config(write(tmp_path / "x.json", {"a": {"b": 1}}), [override])


def test_merging_leaves_both_as_they_are() -> None:
    base, over = {"a": {"b": 1, "c": {"d": 1}}, "e": 1}, {"a": {"c": 3}, "e": {"f": 1}}
    assert merged(base, over) == {"a": {"b": 1, "c": 3}, "e": {"f": 1}}
    assert base == {"a": {"b": 1, "c": {"d": 1}}, "e": 1}
