"""What a shell completes: commands, their options, choices, and files."""

import shlex
import subprocess
from pathlib import Path

import pytest

from pretrain.commands import COMMANDS
from pretrain.completion import main


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda text: printed.append(text))
        assert main(["bash"]) == 0
    path = tmp_path_factory.mktemp("completion") / "textldm.bash"
    path.write_text(printed[0])
    return path


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(shlex.quote(word) for word in words)
    code = f"source {shlex.quote(str(script))}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _shtab_textldm"
    done = subprocess.run(
        ["bash", "-c", code + '; printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
    )
    return done.stdout.split()


def test_bash_completes_commands_options_choices_and_files(script: Path) -> None:
    assert set(completed(script, "textldm", "")) >= set(COMMANDS)
    assert completed(script, "textldm", "prep") == ["prepare"]
    assert completed(script, "textldm", "train", "--allow") == ["--allow-change"]
    assert completed(script, "textldm", "hosts", "c") == ["check"]
    assert completed(script, "textldm", "hosts", "check", "--sh") == ["--shared"]
    assert completed(script, "textldm", "convert", "--dtype", "b") == ["bf16"]
    assert completed(script, "textldm", "diagnose", "--run", "text") == ["textldm.bash"]


def test_zsh_has_a_script_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef textldm")
