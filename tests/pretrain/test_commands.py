"""Every command of `textldm` leads somewhere and says what it takes; a misspelt one is named at once."""

import argparse
import importlib
import subprocess
import sys

import pytest

from pretrain.__main__ import main, overview
from pretrain.commands import COMMANDS, GROUPS


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


@pytest.mark.parametrize(("module", "name"), [("data_pipeline.prepare", "prepare"), ("pretrain.diagnose", "diagnose")])
def test_packages_that_bear_a_commands_name_run_as_such(module: str, name: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: textldm {name} ")
