"""Keep a training job alive: restart it from its newest checkpoint, on the hosts that answer, until it is finished.

    textldm supervise --hostfile hosts -- --config dit_xl --set train.steps=400000

What follows `--` goes to pretrain/train.py; without a hostfile the job runs on this machine. A host that does not answer
is left out; once one of those answers again, the job saves and is started with it (--rejoin-s). Exit codes of the job (`train.py --help`):

    0        finished: so does this command
    2, 87    a restart would end the same way: given up, with that code
    85       asked to stop by a signal: started again at once
    others   started again after a pause; given up after --max-failures starts in a row without a new checkpoint

A signal to this command stops the job, and this command ends with the job's code: 85, unless something else went wrong.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.outside import WORD
from data_pipeline.core.telling import tellable
from pretrain.checkpoint.find import complete_steps
from pretrain.config.command_line import make_parser as train_parser
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.faults.exit_codes import EXIT_CODES, EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, MAX_FAILURES, restart
from pretrain.faults.heartbeat import read_heartbeats
from pretrain.faults.output import lasting_output
from pretrain.jobs.hosts import ROOT, answering, for_pdsh, launch_variables, on_hosts, own_secrets, read_hostfile
from pretrain.ranks.launcher import on_free_port, stop_signals
from pretrain.runs.folder import begun_anew, put_aside
from pretrain.runs.inputs import find_inputs

JOB = "TEXTLDM_JOB"
"""A variable in the environment of all of a job's processes, by which those that outlive it are found, and its name (ranks/launcher.py)."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 5.0, 120.0
DEAD_S = 120.0
"""A launcher whose ranks have written no heartbeat for so long waits in vain (faults/watchdog.py's HEARTBEAT_S is much shorter)."""
REJOIN_S = 300.0
"""To stop for a host that is back costs the others about a minute, so one that comes and goes must not do it all the time."""
POLL_S = 2.0
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
"""What may end a job that is being stopped, from its scheduler or from here."""


@dataclass
class Plan:
    """What is supervised: the run's configuration, the arguments of train.py, and how and where it is launched.

    `fresh` is no argument of train.py here: the run folder is put aside before the first start, and by no later one.
    """

    config: RunConfig
    arguments: list[str]
    fresh: bool
    hosts: dict[str, int]
    launcher: list[str]
    max_failures: int
    wait_s: float
    rejoin_s: float

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.config.run_folder

    def checkpoints(self) -> dict[int, str]:
        """Fingerprints of the complete checkpoints by step, newest first."""
        return complete_steps(self.run)


class Supervisor:
    """Starts the job again and again; `stop` may be called at any time, from a signal handler."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self._job = plan, uuid.uuid4().hex
        self._stop: str | None = None

    def stop(self, number: int, _: object = None) -> None:
        """Let the job write a checkpoint and end, then end too."""
        self._stop = self._stop or signal.Signals(number).name

    def run(self) -> int:
        """Start the job until it is finished, hopeless, or to be stopped; returns the exit code. Raises: UserError."""
        failures, pause_s, fresh = 0, FIRST_PAUSE_S, self.plan.fresh
        while True:
            hosts = self._available_hosts()
            if self._stop:
                return EXIT_REQUEUE
            if fresh:
                put_aside(self.plan.run)
                begun_anew(self.plan.run)
                fresh = False
            before = self.plan.checkpoints()
            where = ", ".join(f"{host} ({slots})" for host, slots in hosts.items()) or "this machine"
            say(f"starting from step {max(before, default=0)} on {where}")
            code = self._run_job(hosts)
            self._end_leftovers(hosts)
            found = self.plan.checkpoints()
            after, progress = max(found, default=0), bool(found.items() - before.items())
            unfinished = after < self.plan.config.train.steps
            # deepspeed says 0 when a signal ended its pdsh.
            if self._stop and unfinished and (code == EXIT_OK or ended_by(code) in STOPPING):
                code = EXIT_REQUEUE
            if code == EXIT_OK and unfinished:
                say(f"the launcher says all is well, but the run is at step {after} of {self.plan.config.train.steps}")
                code = EXIT_FAILED
            say(f"the job ended with exit code {code} ({meaning(code)}) at step {after}")
            if restart(code) == "never":
                return code
            if self._stop:
                return code
            if progress:
                failures, pause_s = 0, FIRST_PAUSE_S
            failures += not progress
            if failures > self.plan.max_failures:
                say(f"giving up: {failures} starts in a row brought no new checkpoint")
                return code
            if restart(code) != "at once":
                say(
                    f"starting again in {pause_s:.0f} s; {failures} of {self.plan.max_failures} failures without progress"
                )
                self._sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stop and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))

    def _available_hosts(self) -> dict[str, int]:
        """Hosts that answer; waits for the first of them. Raises: UserError."""
        hosts, deadline = self.plan.hosts, time.monotonic() + self.plan.wait_s
        while hosts and not self._stop:
            alive = answering(hosts)
            for host in hosts.keys() - set(alive):
                say(f"{host} does not answer")
            if alive:
                return {host: hosts[host] for host in alive}
            if time.monotonic() > deadline:
                raise UserError(
                    f"none of {len(hosts)} hosts answers; waited {self.plan.wait_s:.0f} s (--wait-s): textldm hosts check says why"
                )
            say("waiting for hosts: none answers")
            self._sleep(min(10.0, self.plan.wait_s / 4))
        return hosts

    def _run_job(self, hosts: Mapping[str, int]) -> int:
        """Start the job and wait for its end; the launcher's exit code."""
        script = [str(ROOT / "pretrain" / "train.py"), *self.plan.arguments]
        environment, command = os.environ | {JOB: self._job}, [*self.plan.launcher, *script]
        if hosts:
            hostfile = self.plan.run.parent / f".{self.plan.run.name}.hosts"
            hostfile.parent.mkdir(parents=True, exist_ok=True)
            hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts.items()), encoding="utf-8")
            variables = launch_variables(os.environ, {JOB: self._job})
            environment |= variables
            for name in own_secrets(os.environ):
                del environment[name]
            # Without force_multi, deepspeed would take a single remaining host for this machine.
            command = [*self.plan.launcher, "--hostfile", str(hostfile), "--force_multi", *quoted(self.plan, script)]
        command = on_free_port(command)
        try:
            return self._await(command, environment, hosts)
        finally:
            if hosts:
                Path(variables["DS_ENV_FILE"]).unlink(missing_ok=True)

    def _await(self, command: list[str], environment: dict[str, str], hosts: Mapping[str, int]) -> int:
        say(shlex.join(command))
        heartbeats = Heartbeats(self.plan.run)
        absent = Absent([host for host in self.plan.hosts if host not in hosts], self.plan.rejoin_s)
        # In a session of its own: Ctrl-C reaches this process alone, which stops the job in order.
        launcher = subprocess.Popen(command, env=environment, start_new_session=True)
        deadline = None
        while launcher.poll() is None:
            if self._stop and deadline is None:
                say(f"{self._stop}: stopping the job")
                deadline = time.monotonic() + self.plan.config.train.grace_s + DEAD_S
                if not heartbeats.signal_main_rank(hosts):
                    deadline = 0.0
            elif not self._stop and (back := absent.returned()) and heartbeats.signal_main_rank(hosts):
                say(f"{', '.join(back)} answers again: the job saves, and is started with it")
            late = deadline is not None and time.monotonic() > deadline
            if late or heartbeats.silent_s() > DEAD_S:
                say("the ranks are silent, but their launcher goes on: ending what is left of the job")
                self._end_leftovers(hosts)
                launcher.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(POLL_S)
        if launcher.returncode < 0 or self._stop:
            # Who signals every process of a job ends its launcher at once, while the ranks write their checkpoint.
            deadline = time.monotonic() + self.plan.config.train.grace_s
            while self._leftovers(hosts) and time.monotonic() < deadline:
                time.sleep(POLL_S)
        return launcher.returncode if launcher.returncode >= 0 else 128 - launcher.returncode  # as shells say it

    def _leftovers(self, hosts: Mapping[str, int], then: str = "") -> bool:
        """Whether processes of this job are alive on the hosts that answer; `then` gets their ids."""
        marked = f"grep -lsF {JOB}={self._job} /proc/[0-9]*/environ | cut -d/ -f3 {then}"
        if hosts:
            answers = [done.stdout.splitlines() for done in on_hosts(hosts, marked).values() if done is not None]
            return any(line.isdigit() for lines in answers for line in lines)  # a login shell may say other things
        return bool(subprocess.run(["sh", "-c", marked], check=False, capture_output=True).stdout)

    def _end_leftovers(self, hosts: Mapping[str, int]) -> None:
        """Kill what outlived the job, such as a frozen rank."""
        self._leftovers(hosts, "| xargs -r kill -KILL")


class Absent:
    """Hosts that a job does without, asked every so many seconds (0: never) by a thread, as one that is down takes its time."""

    def __init__(self, hosts: Sequence[str], every_s: float) -> None:
        self._hosts, self._every_s = list(hosts) if every_s else [], every_s
        self._asked_at = time.monotonic()
        self._asking: threading.Thread | None = None
        self._found: list[str] = []

    def returned(self) -> list[str]:
        """Those that answered when they were last asked; empty while that is not known."""
        if self._asking is None and self._hosts and time.monotonic() - self._asked_at > self._every_s:
            self._asking = threading.Thread(target=self._ask, daemon=True)
            self._asking.start()
        if self._asking is None or self._asking.is_alive():
            return []
        self._asking, self._asked_at = None, time.monotonic()
        return self._found

    def _ask(self) -> None:
        self._found = answering(self._hosts)


class Heartbeats:
    """What the ranks' heartbeats say since this object was made."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._last = read_heartbeats(run)
        self._changed_at: float | None = None

    def silent_s(self) -> float:
        """Seconds since any rank last wrote one; 0 before the first."""
        found = read_heartbeats(self._run)
        if found != self._last:
            self._last, self._changed_at = found, time.monotonic()
        return 0.0 if self._changed_at is None else time.monotonic() - self._changed_at

    def signal_main_rank(self, hosts: Mapping[str, int]) -> bool:
        """SIGUSR1 to rank 0, which tells the others; False if it has not started to train."""
        self.silent_s()
        beat = next((beat for beat in self._last if beat.rank == 0), None)
        if self._changed_at is None or beat is None:
            return False
        command = f"kill -USR1 {beat.pid}"
        first = next(iter(hosts), None)
        if first is None or beat.host == socket.gethostname():
            return subprocess.run(["sh", "-c", command], check=False).returncode == 0
        done = on_hosts([first], command)[first]
        return done is not None and done.returncode == 0


def quoted(plan: Plan, script: Sequence[str]) -> list[str]:
    """train.py and its arguments for the other hosts' shells. Raises: UserError."""
    for place in (sys.executable, os.getcwd(), script[0]):  # deepspeed does not quote them
        if not WORD.fullmatch(place):
            raise UserError(
                f"{place!r} cannot be passed to other hosts on a command line; move it to a folder without blanks and signs"
            )
    pastes = not any(argument.partition("=")[0] == "--launcher" for argument in plan.launcher)
    return [script[0], *(for_pdsh(argument, pastes) for argument in script[1:])]


def meaning(code: int) -> str:
    """What the exit code of a rank or a launcher means, in words."""
    ended = ended_by(code)
    return f"ended by {ended.name}" if ended else EXIT_CODES.get(code, "unknown")


def ended_by(code: int) -> signal.Signals | None:
    """The signal that ended a rank, as launchers say it: 128 + n, or 256 - n."""
    if code > 128:
        with contextlib.suppress(ValueError):
            return signal.Signals(code - 128 if code < 160 else 256 - code)
    return None


def say(message: str) -> None:
    """A line of the log."""
    print(tellable(f"supervise {time.strftime('%F %T')}: {message}"), flush=True)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="textldm supervise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostfile", type=Path, help="hosts of the job; without it, this machine")
    parser.add_argument(
        "--launcher", default="deepspeed -q", help='its command, e.g. "deepspeed --master_port 29501" (deepspeed -q)'
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=MAX_FAILURES,
        metavar="N",
        help="in a row, without a new checkpoint (%(default)s)",
    )
    parser.add_argument("--wait-s", type=float, default=600.0, metavar="S", help="for hosts, when none answers (600)")
    parser.add_argument(
        "--rejoin-s",
        type=float,
        default=REJOIN_S,
        metavar="S",
        help="between two looks for hosts that the job does without (%(default).0f); 0: they wait for the next restart",
    )
    parser.add_argument("train", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS", help="of pretrain/train.py")
    return parser


def make_plan(argv: list[str] | None) -> Plan:
    """The plan that a command line asks for. Raises: UserError."""
    arguments = make_parser().parse_args(argv)
    training = arguments.train[1:] if arguments.train[:1] == ["--"] else arguments.train
    parsed = train_parser().parse_args(training)
    if parsed.dry_run:
        raise UserError("--dry-run ends by itself; run it with pretrain/train.py, not under textldm supervise")
    config = load_config(parsed.config, [*parsed.set, *([f"train.run={parsed.run}"] if parsed.run else [])])
    hosts = read_hostfile(arguments.hostfile) if arguments.hostfile else {}
    launcher = shlex.split(arguments.launcher)
    if any(argument.startswith("--ssh_port") for argument in launcher):
        raise UserError(
            "--launcher has --ssh_port, which the supervisor's own ssh does not see: set Port in ~/.ssh/config"
        )
    if not launcher or not shutil.which(launcher[0]):
        raise UserError(
            f"there is no {launcher[0] if launcher else 'command'} on the PATH to start the job by: activate the environment"
            " that has it, or give --launcher with its path"
        )
    if parsed.fresh:  # argparse takes it abbreviated too
        training = [argument for argument in training if len(argument) < 3 or not "--fresh".startswith(argument)]
        find_inputs(config)  # a mistake puts nothing aside
    plan = Plan(
        config, training, parsed.fresh, hosts, launcher, arguments.max_failures, arguments.wait_s, arguments.rejoin_s
    )
    if hosts:
        quoted(plan, [str(ROOT / "pretrain" / "train.py"), *training])  # a mistake is said before anything starts
    return plan


@cli
@lasting_output()
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    supervisor = Supervisor(make_plan(argv))
    for number in (*stop_signals(), signal.SIGINT):
        signal.signal(number, supervisor.stop)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main(None))
