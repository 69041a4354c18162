"""What deepspeed was told, as the processes that it started see it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
RANK = """
from data_pipeline.core.errors import UserError
from data_pipeline.core.launcher import check_hostfile
try:
    check_hostfile()
    print(None)
except UserError as error:
    print(error)
"""


def launched(folder: Path, arguments: list[str], rank: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a rank's command below two processes with the arguments by which deepspeed and its launcher are known."""
    launch = f"import subprocess, sys; sys.exit(subprocess.run({rank!r}).returncode)"
    runner = (
        "import subprocess, sys; "
        f"sys.exit(subprocess.run([sys.executable, '-c', {launch!r}, 'deepspeed.launcher.launch']).returncode)"
    )
    return subprocess.run(
        [sys.executable, "-c", runner, *arguments, "train.py"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--hostfile", "nowhere"], "there is no hostfile nowhere, without which"),
        (["--hostfile=nowhere"], "there is no hostfile nowhere, without which"),
        (["-H", "nowhere"], "there is no hostfile nowhere, without which"),
        (["--hostfile", "hosts"], "None"),
        (["--num_accelerators", "2"], "None"),
    ],
)
def test_a_hostfile_that_deepspeed_did_not_find_is_noticed(tmp_path: Path, arguments: list[str], missing: str) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    assert launched(tmp_path, arguments, [sys.executable, "-c", RANK]).stdout.startswith(missing)
