"""Every command of `textldm` leads somewhere and says what it takes; a misspelt one is named at once."""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.__main__ import main, overview
from pretrain.commands import COMMANDS, GROUPS
from tests.pretrain.tiny_run import config_values, write_config


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All that `--help` has to tell of a parser: its options and its subcommands."""
    told = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return {
        name for action in told for name in (*action.option_strings, *(action.choices or ())) if isinstance(name, str)
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_tells_its_options_under_its_own_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = importlib.import_module(COMMANDS[name].line or COMMANDS[name].module).make_parser()
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    # The recipe is what ./run.sh runs.
    assert printed.startswith(f"usage: {'./run.sh' if name == 'quickstart' else f'textldm {name}'} ")
    assert not [option for option in options_of(parser) if option not in printed]


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - {"quickstart", "completion"}))
def test_an_unknown_option_is_a_mistake_of_the_user(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main([name, "--no-such-option"]))
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_an_unknown_command_is_named_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepair"]) == 2
    message = capsys.readouterr().err
    assert "textldm has no command 'prepair'; expected one of quickstart, " in message
    assert message.endswith("did you mean prepare?\n")
    assert main(["xyzzy"]) == 2
    assert "did you mean" not in capsys.readouterr().err


def test_help_is_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == overview()
    assert all(f"\n  {name} " in overview() for name in COMMANDS)
    assert all(f"\n{group}:\n" in overview() for group in GROUPS)
    assert max(map(len, overview().splitlines())) <= 140


@pytest.mark.parametrize("arguments", [["nonsense"], ["--help"], []])
def test_nothing_slow_is_imported_before_a_mistake_is_found(arguments: list[str]) -> None:
    code = f"""
import sys
from pretrain.__main__ import main
main({arguments})
slow = {{"torch", "deepspeed", "transformers", "datasets", "numpy", "pydantic"}} & sys.modules.keys()
raise SystemExit(f"imported {{slow}}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command", [["pretrain/train.py"], ["data_pipeline/cache_features.py"], ["-m", "pretrain", "cache"]]
)
def test_an_interrupt_during_the_imports_is_silent(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "pydantic.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, *command, "--config", "vae_base"], cwd=root, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_interrupt_while_a_command_is_imported_is_silent(tmp_path: Path) -> None:
    """Of every command, at the first thing that each of them imports."""
    (tmp_path / "argparse.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pretrain", name], cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for name in COMMANDS
    }  # fmt: skip
    ended = {name: (process.communicate()[0], process.returncode) for name, process in started.items()}
    assert ended == dict.fromkeys(COMMANDS, (b"", -signal.SIGINT))


def test_mistakes_in_a_command_line_are_found_without_torch(tmp_path: Path) -> None:
    """In arguments, configurations and paths; of the commands that need torch to work, and of those that never do."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_config(tmp_path / "c.json", config_values(data, run))
    write_config(tmp_path / "typo.json", config_values(data, run) | {"trian": {}})
    (tmp_path / "unmade").mkdir()
    shutil.copy(tmp_path / "c.json", tmp_path / "unmade" / "config.json")
    config, typo = ["--config", str(tmp_path / "c.json")], ["--config", str(tmp_path / "typo.json")]
    launcher = ["--launcher", "true", "--hostfile", str(tmp_path / "hosts")]
    mistakes = [
        (["train", *typo], "unknown key trian"),
        (["train", *config], "data is no finished folder; if it was moved, say where it is now with --set data.path="),
        (["cache", *typo, "--set", "repa.layr=3"], "repa.layr"),
        (["cache", "--data", str(data)], "--teacher is missing"),
        (["cache", "--data", str(data), "--teacher", "x/y"], "say where it is now with --data;"),
        (["cache", "check", "--data", str(data)], "say where it is now with --data;"),
        (["diagnose", "--run", str(tmp_path / "none")], "has no config.json"),
        (["diagnose", "--run", str(tmp_path / "unmade"), "--set", "diagnose.row=3"], "diagnose.rows"),
        (["diagnose", "--run", str(tmp_path / "unmade")], "no checkpoint yet"),
        (["supervise", "--", *typo], "unknown key trian"),
        (["supervise", *launcher, "--", *config], "there is no hostfile"),
        (["supervise", "--launcher", "true", "--", *config, "--fresh"], "say where it is now with --set data.path="),
        (["generate", "--model", str(tmp_path / "gone"), "--prompt", "x"], "no such folder"),
        (["generate", "--model", "x/y", "--num-steps", "0"], "expected at least 1"),
        (["evaluate", "--model", "./gone", "--benchmark", "lm1b", "--output", "x.json"], "no such folder"),
        (["evaluate", "sweep", "--model", "x/y", "--benchmark", "lm1b", "--output", "x.json"], "nothing to sweep"),
        (["hosts", "check", str(tmp_path / "hosts")], "there is no hostfile"),
        (
            ["prepare", "--source", "nowhere.jsonl", "--tokenizer", "./x", "--output", str(data)],
            "./x: no such folder or file",
        ),
    ]
    code = """
import contextlib, io, json, sys
from pretrain.__main__ import main
for arguments, expected in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    slow = {"torch", "deepspeed", "transformers", "datasets", "matplotlib"} & sys.modules.keys()
    if code != 2 or expected not in said.getvalue() or slow:
        raise SystemExit(f"{arguments}: {code}, {said.getvalue()!r}, expected {expected!r}; imported {slow}")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(mistakes), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("module", "name"), [("data_pipeline.prepare", "prepare"), ("pretrain.diagnose", "diagnose")])
def test_packages_that_bear_a_commands_name_run_as_such(module: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: textldm {name} ")
