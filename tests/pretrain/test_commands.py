"""Every command of `textldm` leads somewhere, and a misspelt one is named."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from pretrain.__main__ import COMMANDS, main, overview


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_a_module_with_a_main(name):
    spec = find_spec(COMMANDS[name].module)
    assert spec is not None
    assert spec.origin is not None
    functions = [
        node.name for node in ast.parse(Path(spec.origin).read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    assert "main" in functions


def test_an_unknown_command_is_named_with_those_that_there_are(capsys):
    assert main(["prepair"]) == 2
    assert "textldm has no command 'prepair'; expected one of quickstart, prepare" in capsys.readouterr().err


def test_help_is_the_map(capsys):
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == overview()
    assert all(f"  {name} " in overview() for name in COMMANDS)
