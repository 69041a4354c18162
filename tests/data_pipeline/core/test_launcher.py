"""What deepspeed was told, as the processes that it started see it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANK = "from pretrain.ranks.launcher import missing_hostfile; print(missing_hostfile())"
LAUNCH = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}], check=True)"
"""Started with the argument by which deepspeed's launcher is known."""


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--hostfile", "nowhere"], "nowhere"),
        (["--hostfile=nowhere"], "nowhere"),
        (["-H", "nowhere"], "nowhere"),
        (["--hostfile", "hosts"], None),
        (["--num_accelerators", "2"], None),
    ],
)
def test_a_hostfile_that_deepspeed_did_not_find_is_noticed(
    tmp_path: Path, arguments: list[str], missing: str | None
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    runner = (
        "import subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {LAUNCH!r}, 'deepspeed.launcher.launch'], check=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner, *arguments, "train.py"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(missing)
