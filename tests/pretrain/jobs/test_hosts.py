"""What reaches the other hosts, and what is said of them, with a fake ssh."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_pipeline.core.errors import UserError
from pretrain.faults.exit_codes import EXIT_USER
from pretrain.jobs import hosts
from pretrain.jobs.hosts import HostReport, check, forwarded, launch_variables
from pretrain.ranks.agreement import versions


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


@pytest.mark.parametrize(
    "host",
    ["-oProxyCommand=touch${IFS}pwned", "-p22", "$(touch", "a;b", "a`b`", "a/b", "ho\u0455t", "a\x1b[2J", "'a'", ""],
)
def test_attack_3_a_host_is_a_name_and_no_option(home: Path, host: str) -> None:
    (home / "hosts").write_text(f"node1 slots=1\n{host} slots=2\n")
    with pytest.raises(UserError, match="line 2: found"):
        hosts.read_hostfile(home / "hosts")


def test_attack_3_ssh_takes_no_host_for_an_option(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "hosts").write_text("me@node-1.x:22 slots=1\nfe80::1 slots=2\n")
    assert hosts.read_hostfile(home / "hosts") == {"me@node-1.x:22": 1, "fe80::1": 2}
    (home / "ssh").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (home / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:{os.environ['PATH']}")
    done = hosts.on_host("-oProxyCommand=x", "true")
    assert done is not None
    assert done.stdout.splitlines()[-3:] == ["--", "-oProxyCommand=x", "true"]


def test_comments_blanks_windows_line_ends_and_a_byte_order_mark_are_passed_over(home: Path) -> None:
    (home / "hosts").write_bytes(
        b"\xef\xbb\xbf# four\r\n\r\n  node1   slots=8  # the first\r\n\t\r\nnode2\tslots=4\r\n"
    )
    assert hosts.read_hostfile(home / "hosts") == {"node1": 8, "node2": 4}


@pytest.mark.parametrize(
    ("line", "said"),
    [("node1 slots=8", "line 2: found node1 again"), ("node2 slots=0", "line 2"), ("node2", "line 2"), ("node2 slots=-1", "line 2"),
     ("node2 slots=eight", "line 2"), ("node2 slots=8 slots=8", "line 2")],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named_with_the_form_of_a_right_one(home: Path, line: str, said: str) -> None:
    (home / "hosts").write_text(f"node1 slots=8\n{line}\n")
    with pytest.raises(UserError, match=rf"{said}.*`node01 slots=8`"):
        hosts.read_hostfile(home / "hosts")


def test_a_hostfile_of_no_host_or_of_another_kind_is_refused(home: Path) -> None:
    (home / "hosts").write_text("# none yet\n\n")
    with pytest.raises(UserError, match="names no host; expected lines like"):
        hosts.read_hostfile(home / "hosts")
    (home / "hosts").write_bytes(b"\x80\xff\x00 slots=8\n")
    with pytest.raises(UserError, match="line 1: found"):
        hosts.read_hostfile(home / "hosts")


def test_a_host_that_refuses_ssh_or_is_unknown_is_named_with_ssh_s_own_reason(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write_ssh(home, monkeypatch)
    with (home / "ssh").open("a") as ssh:
        ssh.write("echo 'ssh: Could not resolve hostname node1: Name or service not known' >&2\nexit 255\n")
    (home / "hosts").write_text("node1 slots=2\n")
    assert hosts.main(["check", str(home / "hosts")]) == 1
    said = capsys.readouterr().out
    assert "node1 does not answer: `ssh node1 true` must work without a password" in said
    assert "ssh says: ssh: Could not resolve hostname node1" in said


ARGUMENTS = [
    "plain", "train.steps=9", "a;touch pwned", "$(touch${IFS}pwned)", "`touch pwned`", "a b", "a b;touch pwned", 'a" ;touch pwned; "',
    "a b $(touch pwned)", "a b `touch pwned`", "a\\ b\\", "a b\\", "it's", "it's a",
    "[0.9,0.95]", "*", "~", "a&b|c>d<e(f)", "#x", "!x", "%n",
    '{"a": "$HOME"}',
]  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_attack_2a_arguments_reach_the_hosts_as_they_are(home: Path, argument: str) -> None:
    """By deepspeed's own rule for pdsh, and then a shell's."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    given = SimpleNamespace(user_args=[hosts.for_pdsh(argument)])
    (pasted,) = PDSHRunner.parse_user_args(SimpleNamespace(args=given))
    done = subprocess.run(["sh", "-c", f'printf "%s" {pasted}'], cwd=home, capture_output=True, text=True, check=False)
    assert done.stdout == argument
    assert not (home / "pwned").exists()


@pytest.mark.parametrize("argument", ["", "a\nb", "a\tb", "a b\x1b"])
def test_attack_2a_what_no_quoting_carries_is_refused(argument: str) -> None:
    with pytest.raises(UserError, match="put it into the configuration's file"):
        hosts.for_pdsh(argument)
    with pytest.raises(UserError, match="cannot be passed"):  # another launcher's rule is not known
        hosts.for_pdsh("a;b", pastes=False)


@pytest.mark.parametrize(
    "line",
    ["A;touch${IFS}pwned=1", "$(touch pwned)=1", "1A=1", "A B=1", "\u0410=1", "A=$(touch pwned)", "A=`x`", 'A=""; touch pwned; ""',
     'A=";touch pwned;"', "A=a\\", "A='x'", "A=\x1b[2J"],
)  # fmt: skip
def test_attack_2b_variables_have_a_grammar_and_values_no_commands(home: Path, line: str) -> None:
    (home / ".deepspeed_env").write_text(f"B=1\n{line}\n")
    with pytest.raises(UserError, match=r"expected \[A-Za-z_\]|cannot be passed to other hosts"):
        forwarded({})


@pytest.mark.parametrize("value", ["x", "a b;c", '"x"', '""', "", "a&b"])
def test_values_come_out_of_deepspeeds_command_as_they_went_in(home: Path, value: str) -> None:
    from deepspeed.launcher.multinode_runner import PDSHRunner

    (home / ".deepspeed_env").write_text(f"A={value}\n")
    runner = SimpleNamespace(exports={})
    for name, passed in forwarded({}).items():
        PDSHRunner.add_export(runner, name, passed)
    done = subprocess.run(
        ["sh", "-c", f'export A={runner.exports["A"]}; printf "%s" "$A"'], capture_output=True, text=True, check=False
    )
    assert done.stdout == value.strip('"')


@pytest.mark.parametrize("value", ["$(touch pwned)", 'a"b'])
def test_attack_2b_what_deepspeed_passes_on_by_itself_is_checked_too(home: Path, value: str) -> None:
    with pytest.raises(UserError, match="PYTHONSTARTUP cannot be passed"):
        forwarded({"PYTHONSTARTUP": value})


def test_attack_10c_secrets_stay_by_any_name_and_in_urls(home: Path) -> None:
    secret = dict.fromkeys(
        (
            "HF_PASS",
            "TORCH_AUTH",
            "NCCL_PASSWD",
            "HF_TOKEN",
            "WANDB_API_KEY",
            "HF_CREDENTIALS",
            "TORCH_PWD",
            "DS_COOKIE",
            "hf_Secret",
        ),
        "x",
    )
    secret |= {"HF_ENDPOINT": "https://me:pass@hub.example", "WANDB_BASE_URL": "https://x/?access_token=abc"}
    harmless = {"NCCL_IB_PKEY": "1", "HF_HOME": "/hf", "WANDB_MODE": "offline", "TORCH_HOME": "hf://datasets/a@b"}
    assert forwarded(secret | harmless) == harmless
    assert hosts.own_secrets({"MLFLOW_TRACKING_PASSWORD": "x", "PYTHONPATH": "/a", "PATH": "/b", "X_KEY": "1"}) == [
        "MLFLOW_TRACKING_PASSWORD"
    ]


def test_attack_10b_the_file_for_other_hosts_is_private_and_goes_with_the_shell(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (home / ".deepspeed_env").write_text("MY_SECRET=x\n")  # the user's own may hold one
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "x")
    hosts.main(["export"])
    (file,) = (home / "textldm").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    out = capsys.readouterr().out
    check = f'{out}\ntest -z "$MLFLOW_TRACKING_TOKEN" && test "$DS_ENV_FILE" = {file} && test -s {file} && echo there'
    for shell in ("bash", "sh"):
        file.write_text("x")
        done = subprocess.run([shell, "-c", check], capture_output=True, text=True, check=False)
        assert done.stdout == "there\n", done.stderr
        assert not file.exists()
    file.write_text("x")
    done = subprocess.run(["bash", "-c", f"trap 'echo own' EXIT\n{check}"], capture_output=True, text=True, check=False)
    assert done.stdout == "there\nown\n"  # the user's own trap stays, and the file until it is old
    os.utime(file, (1, 1))
    hosts.launch_variables({"NCCL_DEBUG": "INFO"})
    assert not file.exists()
