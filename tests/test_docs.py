"""What the pages tell a reader to type is understood by what reads it: no renamed option, key, command, script or import is left behind.

Nothing heavy runs: a command line goes through its command's own parser, a configuration through the reader, a snippet's imports are
made. That the commands do what they say is the other tests' business.
"""

import argparse
import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.core.mistakes import keys
from data_pipeline.features.command_line import with_config
from pretrain.commands import COMMANDS
from pretrain.config.load import load_config
from pretrain.config.registry import stage_kind, stage_names
from pretrain.engine.optimizer_settings import optimizer_names, optimizer_settings
from pretrain.evaluate import command_line as evaluate
from pretrain.plan.__main__ import make_simulate_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LAUNCHERS = {"deepspeed", "torchrun", "srun"}
OF_OTHERS = {
    "--hostfile",
    "--no-deps",
    "--long",
    "--test",
    "--kill-on-bad-exit",
    "--master_port",
    "--num_accelerators",
    "--dry",
}
"""Options in the pages of programs that are not ours, or of ./run.sh itself."""


def snippets(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def inline(page: Path) -> list[str]:
    return [" ".join(code.split()) for code in INLINE.findall(FENCE.sub("", page.read_text()))]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """Every command in the pages, configurations and the cluster's files: where it stands, its words."""
    for page in PAGES:
        lines = [line for code in snippets(page, "bash") for line in code.splitlines()]
        lines += [code for code in inline(page) if re.match(r"(textldm|deepspeed|python -m|\./run\.sh) ", code)]
        yield from ((page.name, shlex.split(line, comments=True)) for line in lines)
    for config in sorted((ROOT / "configs").glob("*.json")):
        if command := json.loads(config.read_text()).get("about", {}).get("command"):
            yield config.name, shlex.split(command)
    for file in sorted((ROOT / "configs" / "cluster").iterdir()):
        for command in re.findall(r"(?:textldm|python -u pretrain/train\.py) .*", file.read_text()):
            if "$" not in command and not command.startswith("textldm-"):
                yield file.name, shlex.split(command)


PARTS = {"evaluate": evaluate.PARTS, "plan": {"simulate": make_simulate_parser}}
"""Parts of commands with a command line of their own."""
LINES = [(f"{place}: {shlex.join(words)}", words) for place, words in command_lines() if words]


def parser_of(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    return importlib.import_module(command.line or command.module).make_parser()


def understood(words: list[str]) -> None:
    """Raise, or exit, if the command line is not understood by who would read it."""
    program, *rest = words
    if program in LAUNCHERS or words[:2] == ["python", "-u"]:
        script = next((place for place, word in enumerate(rest) if word.endswith(".py")), None)
        if script is None:
            return  # a way to start things
        assert (ROOT / rest[script]).is_file()
        understood_by({"train.py": "train", "cache_features.py": "cache"}[Path(rest[script]).name], rest[script + 1 :])
    elif program == "python":
        assert importlib.util.find_spec(rest[1])
    elif program == "./run.sh":
        usage = subprocess.run([ROOT / "run.sh", "--help"], capture_output=True, text=True, check=True).stdout
        assert all(word in usage for word in rest[:1])
    elif program == "sbatch":
        assert (ROOT / rest[0]).is_file()
        understood_by("train", ["--config", *rest[1:]])
    elif program == "kubectl":
        assert (ROOT / rest[-1]).is_file()
    elif program == "textldm":
        understood_by(rest[0], rest[1:])
    else:
        assert program in {"source", "pip", "eval", "sbatch", "kubectl"}, (
            f"what is {program}? say in this test how it is understood"
        )


def understood_by(name: str, arguments: list[str]) -> None:
    if name in ("NAME", "--help") or "NAME" in arguments:
        return
    assert name in COMMANDS
    if not arguments:
        return  # a name, not a command line
    if name == "prepare" and arguments[0] in ("inspect", "verify"):
        return
    if name == "evaluate" and arguments[0] == "harness":
        return  # the command line of lm-evaluation-harness
    if arguments[0] in PARTS.get(name, {}):
        if len(arguments) > 1:
            PARTS[name][arguments[0]]().parse_args(arguments[1:])
        return
    choices = [choice for action in parser_of(name)._actions for choice in action.choices or ()]
    if len(arguments) == 1 and arguments[0] in choices:
        return  # the name of a part of a command
    parsed = parser_of(name).parse_args(arguments)
    if name == "train":
        load_config(parsed.config, [*parsed.set, *([f"train.run={parsed.run}"] if parsed.run else [])])
    elif name == "supervise":
        understood_by("train", [word for word in parsed.train if word != "--"])
    elif name == "cache":
        with_config(parsed)
    elif name == "config":
        load_config(arguments[0])


def known_keys() -> dict[str, set[str]]:
    """Keys of all stages' configurations by their section."""
    found: dict[str, set[str]] = {}
    for stage in stage_names():
        for key in keys(stage_kind(stage).config):
            section, _, name = key.name.partition(".")
            found.setdefault(section, set()).add(name)
    for kind in optimizer_names():
        found["optimizer"] |= {key.name for key in keys(optimizer_settings(kind))}
    return found


@pytest.mark.parametrize("words", [words for _, words in LINES], ids=[place for place, _ in LINES])
def test_every_command_is_understood(words: list[str]) -> None:
    understood(words)


def test_there_are_commands_to_understand() -> None:
    assert len(LINES) > 40
    with pytest.raises(SystemExit):
        understood(["textldm", "diagnose", "--runs", "x", "--no-such-option"])
    with pytest.raises(ValueError, match=r"unknown key train\.step"):
        understood(["deepspeed", "pretrain/train.py", "--config", "dit_xl", "--set", "train.step=1000"])


def test_every_option_and_key_that_a_page_names_is_one() -> None:
    """In running text: `--set train.steps=1000`, `data.path`, `--report-only`."""
    sections, options = known_keys(), set(OF_OTHERS)
    for name in COMMANDS:
        for action in parser_of(name)._actions:
            options |= set(action.option_strings)
            for below in (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else ():
                options |= set(below._option_string_actions)
    for make_parser in (make for parts in PARTS.values() for make in parts.values()):
        options |= set(make_parser()._option_string_actions)
    wrong = []
    for page in PAGES:
        for code in inline(page):
            option = re.match(r"(--[a-z][\w-]*)", code)
            if option and option[1] not in options:
                wrong.append(f"{page.name}: {code}")
            key = re.fullmatch(r"(?:--set )?([a-z_]+)\.([a-z_.]+)(?:=\S*)?", code)
            if key and key[1] in sections and key[2] not in ("json", "py") and not known(key[2], sections[key[1]]):
                wrong.append(f"{page.name}: {code}")
    assert not wrong


def known(name: str, names: set[str]) -> bool:
    """A key, or the section that keys lie in; what the deepspeed section holds is free."""
    return not names - {""} or name in names or any(other.startswith(f"{name}.") for other in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_imports_of_every_snippet_are_there(page: Path) -> None:
    for code in snippets(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith("my_package"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
            elif isinstance(node, ast.Import):
                assert all(importlib.util.find_spec(alias.name) for alias in node.names)


def test_a_run_is_watched_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    import matplotlib

    matplotlib.use("Agg")
    (tmp_path / "runs" / "dit_xl").mkdir(parents=True)
    lines = [{"kind": "eval", "step": step, "eval/nats": 5.0, "eval/unigram_nats": 6.0} for step in (1, 2)]
    (tmp_path / "runs" / "dit_xl" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in [{"kind": "train", "step": 1, "loss": 1.0}, *lines])
    )
    monkeypatch.chdir(tmp_path)
    (code,) = snippets(ROOT / "docs" / "running.md", "python")
    exec(compile(code, "running.md", "exec"), {})
