"""What reaches the other hosts, and what is said of them, with a fake ssh."""

import json
import os
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.faults.exit_codes import EXIT_USER
from pretrain.jobs import hosts
from pretrain.jobs.hosts import HostReport, check, forwarded, launch_variables, versions


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, working and cache folder, and the only one on the PATH but the system's own."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_ssh(folder: Path, monkeypatch: pytest.MonkeyPatch, *says: str) -> None:
    """A fake ssh to a host that says this, whatever is asked of it."""
    (folder / "ssh").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in says))
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def passed_on(variables: dict[str, str]) -> dict[str, str]:
    """What the file that deepspeed is told of holds."""
    return dict(line.split("=", 1) for line in Path(variables["DS_ENV_FILE"]).read_text().splitlines())


def test_secrets_stay_and_the_tokenizers_switch_goes(home: Path) -> None:
    kept = ("HF_TOKEN", "HF_TOKEN_PATH", "WANDB_API_KEY", "CUDA_VISIBLE_DEVICES", "DS_ENV_FILE", "PATH")
    environ = dict.fromkeys(kept, "x") | {"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}
    assert forwarded(environ) == {"NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize("own", [".deepspeed_env", "mine.env"])
def test_exporting_again_sees_what_has_changed_and_keeps_the_users_file(home: Path, own: str) -> None:
    (home / own).write_text("GLOO_SOCKET_IFNAME=eth7\n")
    shell = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"} | ({"DS_ENV_FILE": own} if own == "mine.env" else {})
    shell |= launch_variables(shell)
    assert passed_on(shell) == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth7"}
    shell["OMP_NUM_THREADS"] = "8"
    del shell["NCCL_DEBUG"]
    for _ in range(2):
        shell |= launch_variables(shell)
        assert passed_on(shell) == {"OMP_NUM_THREADS": "8", "GLOO_SOCKET_IFNAME": "eth7"}
    (home / "other.env").write_text("GLOO_SOCKET_IFNAME=eth8\n")
    assert passed_on(launch_variables(shell | {"DS_ENV_FILE": "other.env"}))["GLOO_SOCKET_IFNAME"] == "eth8"


def test_a_host_whose_login_shell_prints_is_understood(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ssh(home, monkeypatch, "welcome", json.dumps(versions() | {"sees": True, "gpus": 2}))
    (report,) = check({"node1": 2}, home / "runs")
    assert report == HostReport("node1", slots=2, gpus=2)
    assert report.line(home) == f"node1 answers, 2 rank(s), 2 GPU(s), same versions, sees {home}"


def test_a_host_that_reports_nothing_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ssh(home, monkeypatch, "welcome")
    (report,) = check({"node1": 2}, home / "runs")
    assert report.gpus is None
    assert report.line(home).startswith("node1 answers, but not with a report: 'welcome'")


def test_what_is_wrong_with_a_host_decides_the_exit_code_and_no_word_in_its_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A folder called "all but this" is no problem; other versions are."""
    shared = home / "all but this"
    (home / "hosts").write_text("node1 slots=2\n")
    command = ["check", str(home / "hosts"), "--shared", str(shared)]
    write_ssh(home, monkeypatch, json.dumps(versions() | {"sees": True, "gpus": 2}))
    assert hosts.main(command) == 0
    write_ssh(home, monkeypatch, json.dumps(versions() | {"sees": False, "gpus": 1, "torch": "0.1"}))
    assert hosts.main(command) == 1
    (report,) = check({"node1": 2}, shared)
    assert [problem.split()[0] for problem in report.problems] == ["has", "does", "has"]
    assert "has torch 0.1" in capsys.readouterr().out


def test_without_ssh_there_is_one_message(home: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("PATH", str(home))
    (home / "hosts").write_text("node1 slots=2\n")
    with pytest.raises(UserError, match="no ssh on the PATH"):
        check({"node1": 2}, home / "runs")
    assert hosts.main(["check", str(home / "hosts")]) == EXIT_USER
    assert "no ssh on the PATH" in capsys.readouterr().err
