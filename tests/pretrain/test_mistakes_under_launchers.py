"""A user's mistake ends every rank with 2, whoever started them and however late it is found: nobody is taken for lost (88), which
schedulers restart for ever, or for preempted (85), and nobody waits.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.faults.exit_codes import EXIT_USER
from pretrain.ranks.launcher import free_port
from tests.pretrain.conftest import Trained
from tests.pretrain.made_hosts import PYTHONPATH

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port"],
}
MISTAKES = {
    "found when the run is resumed": ("optimizer.lr=0.5", "optimizer.lr was 0.01, is 0.5"),
    "found before the ranks have met": ("train.stepps=3", "unknown key train.stepps"),
}
RANK = f"""
import json, os, pathlib, signal, subprocess, sys, time

command = [sys.executable, *(word for word in sys.argv[1:] if not word.startswith("--local"))]
codes = []
for override in {[override for override, _ in MISTAKES.values()]}:
    if os.environ["RANK"] == "1" and codes:
        time.sleep(1)  # on a slower host: the launcher's signal comes before it has looked at its configuration
    rank = subprocess.Popen([*command, "--set", override], start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: rank.terminate())  # by which launchers end the others
    codes.append(rank.wait())
pathlib.Path(f"codes-{{os.environ['RANK']}}").write_text(json.dumps(codes))
sys.exit(codes[-1])
"""
"""What a launcher starts here: a rank of one job, and then of the next, whose exit codes are written down. Starts are slow."""


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_rank_ends_with_2(launcher: str, trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.vae, tmp_path / "run")
    (tmp_path / "rank.py").write_text(RANK)
    program, *options = LAUNCHERS[launcher]
    run = tmp_path / "run"
    train = [str(ROOT / "pretrain" / "train.py"), "--config", str(run / "config.json"), "--run-folder", str(run)]
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *options, str(free_port()), "rank.py", *train],
        env={name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    for _, said in MISTAKES.values():
        assert said in output, output[-5000:]
    codes = {file.name: json.loads(file.read_text()) for file in tmp_path.glob("codes-*")}
    assert codes["codes-0"] == [EXIT_USER] * 2, output[-5000:]
    late, early = codes["codes-1"]
    assert late == EXIT_USER, output[-5000:]
    assert early in (EXIT_USER, -signal.SIGTERM), output[-5000:]  # the launcher's signal may come before its first line
    assert process.returncode == (1 if launcher == "torchrun" else EXIT_USER)  # torchrun says 1 whatever it was
