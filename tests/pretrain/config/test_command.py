"""`textldm config`: every key with its value, what a resumed run may do with it, and its meaning."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.config import __main__ as config_module
from pretrain.config.load import load_config


def test_printing_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_module.main(["dit_b", "--set", "train.steps=7000"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^train\.steps = 7000 +free +Optimizer steps in all\.  \[int\]$", printed, flags=re.MULTILINE)
    assert re.search(r"^optimizer\.lr = 0\.0001 +ask +Peak learning rate", printed, flags=re.MULTILINE)
    assert re.search(r"^data\.streams = 192 +never ", printed, flags=re.MULTILINE)
    assert config_module.main(["dit_b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "dit"
    assert config_module.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: no configuration nothing")


def test_a_base_is_printed_with_its_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert config_module.main(["dit_l", "--json"]) == 0
    printed = capsys.readouterr().out
    assert "base" not in json.loads(printed)
    (tmp_path / "whole.json").write_text(printed)
    assert load_config(tmp_path / "whole.json") == load_config("dit_l")


@pytest.mark.parametrize("arguments", [["dit_l", "--json"], ["vae_base", "--set", "train.stesp=1"], ["dit_x1"]])
def test_configurations_and_their_mistakes_need_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from pretrain.config.__main__ import main
assert main({arguments}) == {0 if "--json" in arguments else 2}
slow = {{"torch", "deepspeed", "transformers", "datasets"}} & sys.modules.keys()
raise SystemExit(f"imported {{slow}}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
