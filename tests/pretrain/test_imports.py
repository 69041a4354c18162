"""A command imports without looking for garbage, and collects it again when it works."""

import gc
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from data_pipeline.core import imports
from pretrain import __main__ as textldm
from pretrain.commands import Command
from tests.pretrain import tiny_run

ROOT = Path(__file__).parents[2]
SCRIPT = """
import gc, os, runpy, sys

class Watching:
    @staticmethod
    def find_spec(name, *_):
        if name == "torch":
            print("collects while importing:", gc.isenabled())

def told(end):
    def say(code):
        print("collects at work:", gc.isenabled(), "frozen:", gc.get_freeze_count() > 10_000, flush=True)
        end(code)
    return say

sys.meta_path.insert(0, Watching)
sys.exit, os._exit = told(sys.exit), told(os._exit)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_scripts_that_launchers_start(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    config = tiny_run.write_config(tmp_path / "c.json", tiny_run.config_values(data, tmp_path / "run"))
    (tmp_path / "teacher").mkdir()
    commands = {
        "pretrain/train.py": ["--config", str(config), "--dry-run", "--as-rank", "0/8"],
        "data_pipeline/cache_features.py": ["--data", str(data), "--teacher", str(tmp_path / "teacher")],
    }
    for script, arguments in commands.items():
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert "collects while importing: False" in done.stdout, (script, done)
        assert "collects at work: True frozen: True" in done.stdout, (script, done)


@pytest.mark.parametrize("fails", [False, True])
def test_commands_of_the_one_entry(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def imported(name: str) -> ModuleType:
        found.append(gc.isenabled())
        if fails:
            raise ImportError(name)
        module = ModuleType(name)
        module.main = lambda _: found.append(gc.isenabled())  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(textldm.importlib, "import_module", imported)
    monkeypatch.setattr(textldm, "COMMANDS", {"toy": Command("toy", "a toy")})
    if fails:
        with pytest.raises(ImportError):
            textldm.main(["toy"])
        assert found == [False]
    else:
        textldm.main(["toy"])
        assert found == [False, True]
    assert gc.isenabled()


def test_what_was_imported_is_not_looked_through_again() -> None:
    imports.begin_imports()
    try:
        assert not gc.isenabled()
        kept = [[] for _ in range(100)]
    finally:
        imports.end_imports()
    assert gc.isenabled()
    looked_through = {id(thing) for thing in gc.get_objects()}
    assert not looked_through & {id(thing) for thing in kept}
