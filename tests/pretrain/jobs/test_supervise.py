"""The supervisor with a fake launcher and a fake ssh: when it restarts, on which hosts, and when it gives up."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.faults.exit_codes import EXIT_FAILED, EXIT_LOST, EXIT_OK, EXIT_REQUEUE, EXIT_SKIPS, EXIT_USER
from pretrain.jobs import supervise
from pretrain.jobs.supervise import Supervisor, make_plan, meaning
from pretrain.ranks.launcher import on_free_port
from tests.pretrain import tiny_run
from tests.pretrain.bare_engine import bare_engine, save

LAUNCHER = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
starts = folder / "starts"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
hosts = Path(sys.argv[sys.argv.index("--hostfile") + 1]).read_text().split() if "--hostfile" in sys.argv else []
env_file = os.environ.get("DS_ENV_FILE", "")
entry = {"hosts": hosts[::2], "arguments": sys.argv[2:], "env_file": env_file, "environment": sorted(os.environ)}
if env_file:
    entry |= {"env": Path(env_file).read_text(), "env_mode": Path(env_file).stat().st_mode & 0o777}
with starts.open("a") as file:
    file.write(json.dumps(entry) + "\\n")
code, step = json.loads((folder / "plan").read_text())[number]
if step == "orphan":
    orphan = subprocess.Popen(["sleep", "600"], start_new_session=True)
    (folder / "orphan").write_text(str(orphan.pid))
elif step == "die":
    places = [str(folder / one / "checkpoints" / "step-000000004") for one in ("model", "run")]
    saving = f"import time, shutil; time.sleep(1); shutil.copytree(*{places!r})"
    subprocess.Popen([sys.executable, "-c", saving], start_new_session=True)
    os.kill(os.getpid(), signal.SIGTERM)
elif step == "obey":
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), -code) if code < 0 else os._exit(code))
    (folder / "run" / "heartbeats").mkdir(parents=True)
    beat = {"rank": 0, "host": __import__("socket").gethostname(), "pid": os.getpid(), "step": 0, "phase": "setup", "stuck_s": 0, "time": 0}
    (folder / "run" / "heartbeats" / "rank-00000.json").write_text(json.dumps(beat))
    time.sleep(60)
elif step:
    name = f"step-{abs(step):09d}"
    shutil.copytree(folder / "model" / "checkpoints" / name, folder / "run" / "checkpoints" / name, dirs_exist_ok=True)
    if step < 0:
        next((folder / "run" / "checkpoints" / name).glob("rank-*")).write_bytes(b"torn")
sys.exit(code)
"""

SSH = """#!/bin/sh
for word in "$@"; do [ -n "$host" ] && command=$word && break; case $word in node*) host=$word ;; esac; done
[ -e "{folder}/$host.down" ] && exit 255
exec sh -c "$command"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds a configuration of 6 steps and 4 streams, a hostfile of four hosts, a fake launcher and a fake ssh."""
    tiny_run.write_config(tmp_path / "c.json", tiny_run.config_values(tmp_path / "data", tmp_path / "run"))
    (tmp_path / "hosts").write_text("# four\n" + "".join(f"node{i} slots=1\n" for i in range(1, 5)))
    for step in (2, 4, 6):
        save(tmp_path / "model", step, bare_engine(seed=step))
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(SSH.replace("{folder}", str(tmp_path)))
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "DS_ENV_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(supervise, "FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr(supervise, "POLL_S", 0.2)
    return tmp_path


def supervised(folder: Path, jobs: list[tuple], *train: str, hostfile: bool = True) -> tuple[int, list[dict]]:
    """Run the supervisor over jobs of (exit code, step of the checkpoint that it leaves, negative if damaged); its code, the starts."""
    supervisor = Supervisor(plan(folder, jobs, *train, hostfile=hostfile))
    code = supervisor.run()
    return code, [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def plan(
    folder: Path, jobs: list[tuple], *train: str, hostfile: bool = True, options: tuple[str, ...] = ()
) -> supervise.Plan:
    (folder / "plan").write_text(json.dumps(jobs))
    hosts = ["--hostfile", str(folder / "hosts")] if hostfile else []
    launcher = ["--launcher", f"{sys.executable} {folder}/launcher.py {folder}", "--wait-s", "0.2"]
    return make_plan([*hosts, *launcher, *options, "--", "--config", str(folder / "c.json"), *train])


def test_failures_are_restarted_until_the_run_is_finished(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, starts = supervised(folder, [(EXIT_LOST, 2), (247, 2), (EXIT_REQUEUE, 4), (0, 6)], "--set", "train.seed=3")
    assert code == 0
    assert [start["hosts"] for start in starts] == [["node1", "node2", "node3", "node4"]] * 4
    assert starts[0]["arguments"][-4:] == ["--config", str(folder / "c.json"), "--set", "train.seed=3"]
    lines = capsys.readouterr().out
    assert "exit code 247 (ended by SIGKILL) at step 2" in lines
    assert "1 of 3 failures without progress" in lines
    assert "starting from step 4" in lines


def test_a_success_without_the_last_checkpoint_is_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervised(folder, [(0, 4), (0, 6)])[0] == 0
    assert "all is well, but the run is at step 4 of 6" in capsys.readouterr().out


@pytest.mark.parametrize("code", [EXIT_USER, EXIT_SKIPS])
def test_what_a_restart_would_meet_again_is_given_up(folder: Path, code: int) -> None:
    assert supervised(folder, [(code, 2), (0, 6)])[0] == code
    assert len((folder / "starts").read_text().splitlines()) == 1


def test_restarts_without_progress_are_bounded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, starts = supervised(folder, [(1, 2), *[(86, 2)] * 9])
    assert (code, len(starts)) == (86, 5)
    assert "giving up: 4 starts in a row" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--fresh", "--fre"])
def test_a_fresh_run_begins_anew_however_its_first_start_ends(folder: Path, flag: str) -> None:
    tiny_run.write_data(folder / "data")
    (folder / "run" / "checkpoints" / "step-000000006").mkdir(parents=True)  # of a finished run
    code, starts = supervised(folder, [(1, 0), (1, 2), (0, 6)], flag)
    assert code == 0
    assert [[a for a in start["arguments"] if a.startswith("--f") and a != "--force_multi"] for start in starts] == [
        []
    ] * 3
    assert (folder / "run.1" / "checkpoints" / "step-000000006").exists()
    assert not (folder / "run.2").exists()
    assert (folder / "run" / "checkpoints" / "step-000000002").exists()


def test_a_mistake_puts_nothing_aside(folder: Path) -> None:
    (folder / "run").mkdir()
    with pytest.raises(UserError, match="data"):
        supervised(folder, [(0, 6)], "--fresh")
    assert [path.name for path in folder.glob("run*")] == ["run"]


def test_progress_is_a_complete_checkpoint_that_was_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, starts = supervised(folder, [(1, -6), (1, 2), *[(1, -4)] * 9])
    assert (code, len(starts)) == (1, 6)  # a damaged one, then step 2, then four in a row that bring nothing
    assert "starting from step 0 on" in (out := capsys.readouterr().out)
    assert "starting from step 2 on" in out
    assert "starting from step 6" not in out


def test_silent_hosts_are_left_out(folder: Path, capsys) -> None:
    (folder / "node1.down").touch()
    code, starts = supervised(folder, [(0, 6)])
    assert code == 0
    assert starts[0]["hosts"] == ["node2", "node3", "node4"]
    assert "--force_multi" in starts[0]["arguments"]
    assert "node1 does not answer" in capsys.readouterr().out


@pytest.mark.parametrize("rejoin_s", ["0.1", "0"])
def test_a_host_that_is_back_is_taken_in_again(folder: Path, capsys: pytest.CaptureFixture[str], rejoin_s: str) -> None:
    """The job without it is asked to save; not where that is switched off."""
    (folder / "node1.down").touch()
    jobs = [(EXIT_REQUEUE, "obey"), (0, 6)]
    supervisor = Supervisor(plan(folder, jobs, options=("--rejoin-s", rejoin_s)))
    stopped = threading.Timer(4, supervisor.stop, [signal.SIGTERM])
    if rejoin_s == "0":
        stopped.start()
    threading.Timer(1, (folder / "node1.down").unlink).start()
    assert supervisor.run() == (EXIT_REQUEUE if rejoin_s == "0" else 0)
    starts = [json.loads(line)["hosts"] for line in (folder / "starts").read_text().splitlines()]
    everyone = ["node1", "node2", "node3", "node4"]
    assert starts == ([everyone[1:]] if rejoin_s == "0" else [everyone[1:], everyone])
    assert ("node1 answers again" in capsys.readouterr().out) is (rejoin_s != "0")


def test_too_few_hosts_are_waited_for_and_named(folder: Path) -> None:
    for number in range(1, 5):
        (folder / f"node{number}.down").touch()
    with pytest.raises(UserError, match="none of 4 hosts answers"):
        Supervisor(plan(folder, [(0, 6)])).run()
    assert not (folder / "starts").exists()


def test_processes_that_outlive_the_job_are_ended(folder: Path) -> None:
    code, _ = supervised(folder, [(1, "orphan"), (0, 6)])
    assert code == 0
    stat = Path(f"/proc/{(folder / 'orphan').read_text()}/stat")
    assert not stat.exists() or ") Z" in stat.read_text()


def test_ranks_whose_launcher_was_killed_may_save(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert supervised(folder, [(0, "die"), (0, 6)], hostfile=False)[0] == 0
    assert "the job ended with exit code 143 (ended by SIGTERM) at step 4" in capsys.readouterr().out


def test_the_jobs_variables_reach_the_hosts_by_deepspeeds_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HF_TOKEN", "secret")
    (folder / ".deepspeed_env").write_text("\n# the user's own\nGLOO_SOCKET_IFNAME=eth7\n")
    _, starts = supervised(folder, [(0, 6)])
    lines = starts[0]["env"].splitlines()
    assert {"OMP_NUM_THREADS=7", "GLOO_SOCKET_IFNAME=eth7"} < set(lines)
    assert any(line.startswith("TEXTLDM_JOB=") for line in lines)
    assert not any("secret" in line for line in lines)


def test_attack_10b_the_variables_file_is_private_and_deleted_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "x")  # deepspeed itself would pass it on
    _, starts = supervised(folder, [(1, 2), (0, 6)])
    assert [start["env_mode"] for start in starts] == [0o600, 0o600]
    assert not any(Path(start["env_file"]).exists() for start in starts)
    assert not any("MLFLOW_TRACKING_PASSWORD" in start["environment"] for start in starts)


def test_attack_2a_arguments_are_quoted_for_the_hosts_and_not_for_this_machine(folder: Path) -> None:
    given = ["--set", 'about.purpose="$(touch pwned);x"']
    _, starts = supervised(folder, [(0, 6)], *given)
    assert starts[0]["arguments"][-2:] == ["--set", 'about.purpose="\\$(touch pwned);x"']
    _, starts = supervised(folder, [(0, 6)], *given, hostfile=False)
    assert starts[-1]["arguments"][-2:] == given


@pytest.mark.parametrize("pid", ["1; touch pwned", "$(touch pwned)", -1, 0, 1.5, True, None, [1], 1 << 40])
def test_attack_11_only_a_process_id_gets_a_signal(folder: Path, monkeypatch: pytest.MonkeyPatch, pid: object) -> None:
    heartbeats = supervise.Heartbeats(folder / "run")
    (folder / "run" / "heartbeats").mkdir(parents=True)
    beat = {"rank": 0, "host": "node1", "pid": pid, "step": 0, "phase": "setup", "stuck_s": 0, "time": 0}
    (folder / "run" / "heartbeats" / "rank-00000.json").write_text(json.dumps(beat))
    for name in ("on_hosts", "subprocess"):
        monkeypatch.setattr(supervise, name, None)
    assert not heartbeats.signal_main_rank({"node1": 1})
    (folder / "run" / "heartbeats" / "rank-00000.json").write_text("[" * 100_000)
    assert not heartbeats.signal_main_rank({"node1": 1})


@pytest.mark.parametrize(
    ("hostfile", "ended", "code"),
    [
        (True, EXIT_REQUEUE, EXIT_REQUEUE),
        (False, EXIT_REQUEUE, EXIT_REQUEUE),
        (False, -signal.SIGTERM, EXIT_REQUEUE),  # a scheduler signals the launcher too
        (True, EXIT_OK, EXIT_REQUEUE),  # so does deepspeed end without pdsh, and this run is not finished
        (False, -signal.SIGSEGV, 128 + signal.SIGSEGV),
        (True, EXIT_FAILED, EXIT_FAILED),
        (False, EXIT_LOST, EXIT_LOST),
    ],
)
def test_a_signal_stops_the_job_through_its_main_rank(folder: Path, hostfile: bool, ended: int, code: int) -> None:
    supervisor = Supervisor(plan(folder, [(ended, "obey")], hostfile=hostfile))

    def stop() -> None:
        while not (folder / "run" / "heartbeats" / "rank-00000.json").exists():
            time.sleep(0.05)
        supervisor.stop(signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert supervisor.run() == code
    thread.join()
    assert len((folder / "starts").read_text().splitlines()) == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_hangs_up_stops_the_job_unless_nohup_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ignored: bool
) -> None:
    def run(supervisor: Supervisor) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return {None: 0, "SIGHUP": EXIT_REQUEUE}[supervisor._stop]

    monkeypatch.setattr(Supervisor, "run", run)
    kept = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    }
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        code = supervise.main(["--launcher", sys.executable, "--", "--config", str(folder / "c.json")])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert code == (0 if ignored else EXIT_REQUEUE)


def test_a_launcher_that_waits_for_silent_ranks_is_ended(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(supervise, "DEAD_S", 0.5)
    assert supervised(folder, [(0, "obey"), (0, 6)], hostfile=False)[0] == 0
    assert "the ranks are silent" in capsys.readouterr().out


def test_mistakes_are_found_before_anything_starts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hostfile", str(folder / "hosts"), "--", "--config", str(folder / "c.json")]
    assert supervise.main([*arguments, "--dry-run"]) == 2
    assert "--dry-run ends by itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("deepspeed --ssh_port 2222", "set Port in ~/.ssh/config"),
        ("deepspeed --ssh_port=2222", "set Port in ~/.ssh/config"),
        ("deepsped --master_port 1", "there is no deepsped on the PATH"),
        ("", "there is no command on the PATH"),
    ],
)
def test_a_launcher_that_cannot_work_is_refused(folder: Path, capsys, launcher: str, expected: str) -> None:
    assert supervise.main(["--launcher", launcher, "--", "--config", str(folder / "c.json")]) == EXIT_USER
    assert expected in capsys.readouterr().err


def test_deepspeed_gets_a_free_port_at_every_start_unless_one_is_named(folder: Path) -> None:
    deepspeed = folder / "bin" / "deepspeed"
    deepspeed.write_text(f'#!/bin/sh\nexec {sys.executable} {folder}/launcher.py {folder} "$@"\n')
    deepspeed.chmod(0o755)
    (folder / "plan").write_text(json.dumps([(1, 2), (0, 6)]))
    training = ["--", "--config", str(folder / "c.json")]
    assert Supervisor(make_plan(training)).run() == 0
    first, second = (json.loads(line)["arguments"] for line in (folder / "starts").read_text().splitlines())
    assert first[0] == second[0] == "--master_port"
    assert first[1] != second[1]
    for named in (["deepspeed", "--master_port", "1"], ["deepspeed", "--master_port=1"], ["torchrun"]):
        assert on_free_port(named) == named


def test_a_login_shell_that_says_things_is_no_leftover(folder: Path) -> None:
    ssh = folder / "bin" / "ssh"
    ssh.write_text(ssh.read_text().replace("exec sh", "echo welcome to 8 GPUs\nexec sh"))
    supervisor = Supervisor(plan(folder, []))
    assert not supervisor._leftovers({"node1": 1})


def test_exit_codes_in_words() -> None:
    assert meaning(247) == meaning(137) == "ended by SIGKILL"
    assert "out of reach" in meaning(EXIT_LOST)
    assert meaning(99) == "unknown"
