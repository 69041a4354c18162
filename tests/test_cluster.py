"""What `configs/cluster/` holds does what it says, without a cluster: fake Slurm commands, and the container's script run here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.faults.exit_codes import EXIT_HUNG, EXIT_LOST, RESTARTS, restart
from pretrain.jobs.hosts import read_hostfile

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "configs" / "cluster"
sys.path.insert(0, str(ROOT / "tests" / "pretrain"))


def test_the_example_hostfile_is_one() -> None:
    assert read_hostfile(CLUSTER / "hosts.example") == {"node01": 8, "node02": 8}


@pytest.mark.parametrize("code", [2, 85, 134])
def test_slurm_requeues_what_a_restart_brings_on(code: int, tmp_path: Path) -> None:
    """By the table; which codes those are: tests/pretrain/jobs/test_requeue.py."""
    for name, body in {
        "srun": f'echo "$@" > {tmp_path}/srun.log; exit {code}',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol.log',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", str(CLUSTER / "slurm.sbatch"), "dit_xl", "--run", str(tmp_path / "run"), "--set", "train.steps=9000"],
        env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert "pretrain/train.py --config dit_xl --run" in (tmp_path / "srun.log").read_text()
    again = restart(code) != "never"
    assert (tmp_path / "scontrol.log").exists() is again, done.stderr
    assert not again or (tmp_path / "scontrol.log").read_text() == "requeue 77\n"


def test_kubernetes_goes_by_the_same_table() -> None:
    """What is never started again fails the job; what another start is sure to help is not counted; the rest is, up to backoffLimit."""
    job = kubernetes()["Job"]["spec"]
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert sorted(rules["FailJob"]) == sorted(code for code, kind in RESTARTS.items() if kind == "never" and code)
    assert set(rules["Ignore"]) == {code for code, kind in RESTARTS.items() if kind == "at once"} | {
        EXIT_HUNG,
        EXIT_LOST,
    }
    assert all(restart(code) == "bounded" for code in (1, 86, 88, 134, 135, 137, 139))
    assert job["backoffLimit"] > 0


def kubernetes() -> dict[str, dict]:
    """The manifest's objects by kind."""
    return {part["kind"]: part for part in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())}


def test_attack_12b_the_pods_let_in_only_one_another_and_can_do_little() -> None:
    found = kubernetes()
    pod = found["Job"]["spec"]["template"]["spec"]
    own = {"matchLabels": {"job-name": found["Job"]["metadata"]["name"]}}
    policy = found["NetworkPolicy"]["spec"]
    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress"]
    assert policy["ingress"] == [{"from": [{"podSelector": own}]}]
    assert found["Service"]["spec"]["selector"] == own["matchLabels"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    limits = container["securityContext"]
    assert limits["allowPrivilegeEscalation"] is False
    assert limits["readOnlyRootFilesystem"] is True
    assert limits["capabilities"] == {"drop": ["ALL"]}
    home = next(entry["value"] for entry in container["env"] if entry["name"] == "HOME")
    assert {home, "/tmp", "/workspace/textldm/runs"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


@pytest.mark.slow
def test_a_pod_that_is_told_to_go_saves_and_says_so(tmp_path: Path) -> None:
    from pretrain.checkpoint.find import saved_steps
    from pretrain.ranks.launcher import free_port
    from tests.pretrain import tiny_run

    job = kubernetes()["Job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["NODES"]) == job["completions"] == job["parallelism"]
    values = tiny_run.config_values(tiny_run.write_data(tmp_path / "data"), tmp_path / "run", steps=100_000)
    variables |= {"CONFIG": str(tiny_run.write_config(tmp_path / "c.json", values)), "NODES": "1", "GPUS": "2"}
    variables |= {"JOB_COMPLETION_INDEX": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        pod = subprocess.Popen(container["command"], cwd=ROOT, env=os.environ | variables, stdout=log, stderr=log)
    try:
        while not saved_steps(tmp_path / "run") and pod.poll() is None:
            time.sleep(0.1)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(300) == 85, (tmp_path / "log").read_text()[-5000:]
    finally:
        pod.kill()
    ignored = [
        rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if rule["action"] == "Ignore" and "onExitCodes" in rule
    ]
    assert ignored == [[85, 86, 88]]
