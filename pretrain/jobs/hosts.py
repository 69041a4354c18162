"""The hosts of a job: the hostfile, who answers, and what deepspeed's launcher must be told to reach and leave them.

    textldm hosts check hosts            does every host answer, with the same versions and files?
    eval "$(textldm hosts export)"       before `deepspeed --hostfile ...`; textldm supervise does it itself

deepspeed starts the other hosts' processes by ssh, with hardly any of this shell's variables and without noticing a
host that is gone. So `export` names a file with the variables that matter there (DS_ENV_FILE; the user's own
.deepspeed_env is part of it and wins), and lets ssh ask for signs of life. Ports, users and keys belong in ~/.ssh/config,
which everything here and deepspeed obey. That file is this user's alone and goes when the job or the shell ends.

deepspeed makes one shell command for the other hosts out of names, values and arguments, and quotes hardly any of it. So names have
a grammar here, arguments are quoted for that shell, and what no quoting carries is refused.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.home import settle_home
from data_pipeline.core.outside import HOST, VARIABLE, WORD, named, parse_json
from data_pipeline.core.storage import atomic_write, user_cache
from data_pipeline.core.telling import is_secret, printable
from pretrain.ranks.agreement import versions

FORWARDED = re.compile(
    r"(OMP|MKL|KMP|GLOO|NCCL|UCX|CUDA|PYTORCH|TORCH|TORCHINDUCTOR|TRITON|HF|TOKENIZERS|WANDB|DS)_\w+|LD_LIBRARY_PATH"
    r"|XDG_CACHE_HOME",
    re.ASCII,
)
KEPT_HERE = ("DS_ENV_FILE", "CUDA_VISIBLE_DEVICES")
"""Each host's own matter. So are secrets, which would be seen in process lists: put them into each host's files."""
BY_DEEPSPEED = re.compile(r"(MLFLOW|PYTHON|MV2|UCX|NCCL|LD_LIBRARY|PATH)")
"""What the names of variables begin with that deepspeed itself passes on."""
UNSAFE = re.compile(r"[\"'`$\\\x00-\x1f\x7f]")
"""deepspeed pastes a value into a shell command, in double quotes at best."""
MADE_HERE = re.compile(r"deepspeed_env-[0-9a-f]{12}")
ANSWERS_WITHIN_S = 20.0
"""A host that takes longer does not answer."""
FORGOTTEN_S = 7 * 86400
"""An older one is of no shell any more."""
USERS_FILE = "TEXTLDM_DS_ENV_FILE"
"""The DS_ENV_FILE of the user, of which the one that `launch_variables` made has taken the place."""
SSH_FAILED = 255
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=10"
ROOT = Path(__file__).resolve().parents[2]


def read_hostfile(path: Path) -> dict[str, int]:
    """Number of ranks ("slots") of every host, in order. Raises: UserError naming the line."""
    if not path.is_file():
        raise UserError(f"there is no hostfile {path}; expected lines like those of configs/cluster/hosts.example")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = re.match(rf"({HOST.pattern})\s+slots=([0-9]{{1,5}})\s*(#.*)?$", line.strip(), re.ASCII)
        if not match or match[1] in hosts or not int(match[2]):
            reason = f"{match[1]} again" if match and match[1] in hosts else repr(line)
            raise UserError(f"{path}, line {number}: found {reason}; expected one line a host, like `node01 slots=8`")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path} names no host; expected lines like `node01 slots=8`")
    return hosts


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that another host's processes need. Raises: UserError for a value that no shell command can hold.

    The user's own file may name any variable, a secret too.
    """
    found = {
        name: value
        for name, value in environ.items()
        if FORWARDED.fullmatch(name) and name not in KEPT_HERE and not is_secret(name, value)
    }
    settle_home()
    for folder in (Path.home(), Path(".")):  # deepspeed's own order: the later one wins
        file = folder / (_users_file(environ) or ".deepspeed_env")
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[named(VARIABLE, name.strip(), f"a variable in {file}", "mend its name")] = value.strip()
    passed = found | {name: value for name, value in environ.items() if BY_DEEPSPEED.match(name)}
    unsafe = [name for name, value in passed.items() if not (VARIABLE.fullmatch(name) and _survives(value))]
    if unsafe:
        raise UserError(
            f"{', '.join(unsafe)} cannot be passed to other hosts: quotes, backslashes, dollar signs and control characters do"
            " not survive deepspeed's command line. Unset it here and set it in each host's own environment"
        )
    return dict(sorted(found.items()))


def _survives(value: str) -> bool:
    """Whether a value comes out of deepspeed's command as it went in, and nothing else with it."""
    if value[:1] == '"' == value[-1:]:  # it would be put into quotes a second time, which then lets it out
        return len(value) == 2 or WORD.fullmatch(value[1:-1]) is not None
    return not UNSAFE.search(value)


def _users_file(environ: Mapping[str, str]) -> str | None:
    """DS_ENV_FILE as the user set it, also in a shell that has since exported ours: its values are from then."""
    named = environ.get("DS_ENV_FILE", "")
    return environ.get(USERS_FILE) if MADE_HERE.fullmatch(Path(named).name) else named or None


def launch_variables(environ: Mapping[str, str], more: Mapping[str, str] = {}) -> dict[str, str]:
    """The variables with which `deepspeed --hostfile` must be started, `more` being passed on to every host as well."""
    lines = "".join(f"{name}={value}\n" for name, value in {**forwarded(environ), **more}.items())
    file = user_cache() / f"deepspeed_env-{hashlib.sha256(lines.encode()).hexdigest()[:12]}"
    for earlier in file.parent.glob("deepspeed_env-*"):  # of shells that were killed
        if MADE_HERE.fullmatch(earlier.name) and time.time() - earlier.stat().st_mtime > FORGOTTEN_S:
            earlier.unlink(missing_ok=True)
    with atomic_write(file, private=True) as out:
        out.write(lines.encode())
    options = environ.get("PDSH_SSH_ARGS_APPEND", "")
    if "ServerAliveInterval" not in options:
        options = f"{options} {SSH_OPTIONS}".strip()
    users = _users_file(environ)
    return {"DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": options} | ({USERS_FILE: users} if users else {})


def for_pdsh(argument: str, pastes: bool = True) -> str:
    """An argument of train.py as `deepspeed --hostfile` must get it, so that the other hosts' shells give it on as it is.

    deepspeed puts what holds a space into double quotes, with backslashes before those in it, and everything else into the command as it
    is. `pastes`: whether it is deepspeed with pdsh; of other launchers it is not known, so that only plain words pass.
    Raises: UserError for what cannot be passed on.
    """
    if WORD.fullmatch(argument):
        return argument
    if not pastes or printable(argument) != argument or set(argument) & set("\n\t") or not argument:
        raise UserError(
            f"{argument!r:.80} cannot be passed to other hosts on a command line; put it into the configuration's file"
        )
    return re.sub(r"([\\`$])", r"\\\1", argument) if " " in argument else shlex.quote(argument)


def own_secrets(environ: Mapping[str, str]) -> list[str]:
    """Names of the variables that deepspeed would pass on, into every host's process list, and that may hold passwords."""
    return [name for name, value in environ.items() if BY_DEEPSPEED.match(name) and is_secret(name, value)]


def on_host(host: str, command: str) -> subprocess.CompletedProcess[str] | None:
    """Run a shell command on a host by ssh; None if the host does not answer in time, exit code 255 if ssh itself failed.

    Raises: UserError without ssh.
    """
    try:
        return subprocess.run(
            ["ssh", *shlex.split(SSH_OPTIONS), "-o", "BatchMode=yes", "--", host, command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=ANSWERS_WITHIN_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None
    except FileNotFoundError:
        raise UserError(
            "there is no ssh on the PATH, by which the other hosts are reached: install OpenSSH's client"
        ) from None


def on_hosts(hosts: Iterable[str], command: str) -> dict[str, subprocess.CompletedProcess[str] | None]:
    """Run a shell command on several hosts at once; what `on_host` gives, by host."""
    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(64, len(names) or 1)) as pool:
        return dict(zip(names, pool.map(lambda host: on_host(host, command), names)))


def answering(hosts: Iterable[str]) -> list[str]:
    """The hosts that can be logged into by ssh, in the order given."""
    return [host for host, done in on_hosts(hosts, "true").items() if done is not None and done.returncode == 0]


@dataclass(frozen=True)
class HostReport:
    """What a host says of itself, and what is wrong with it."""

    host: str
    slots: int
    gpus: int | None = None
    """None if it did not say."""
    problems: tuple[str, ...] = ()

    def line(self, shared: Path) -> str:
        """The report in one line for people."""
        if self.gpus is None:
            return f"{self.host} {'; '.join(self.problems)}"
        state = f"{self.host} answers, {self.slots} rank(s), {self.gpus or 'no'} GPU(s)"
        return f"{state}, but {'; '.join(self.problems)}" if self.problems else f"{state}, same versions, sees {shared}"


def check(hosts: Mapping[str, int], shared: Path) -> list[HostReport]:
    """Ask all hosts at once; `shared` is a folder that all of them are to see."""
    shared.mkdir(parents=True, exist_ok=True)
    sign = shared / f".seen-from-all-hosts-{uuid.uuid4().hex}"
    sign.touch()
    python, folder = shlex.quote(sys.executable), shlex.quote(str(ROOT))
    report = f"{python} -m pretrain hosts report {shlex.quote(str(sign.resolve()))}"
    try:
        answers = on_hosts(hosts, f"cd {folder} && {report}")
    finally:
        sign.unlink()
    return [_report(host, slots, answers[host], shared) for host, slots in hosts.items()]


def _report(host: str, slots: int, done: subprocess.CompletedProcess[str] | None, shared: Path) -> HostReport:
    silent = None
    if done is None or done.returncode == SSH_FAILED:
        said = printable(done.stderr.strip()[-300:]) if done is not None else ""
        silent = f"does not answer: `ssh {host} true` must work without a password" + f"; ssh says: {said}" * bool(said)
    elif done.returncode:
        silent = f"answers, but {sys.executable} in {ROOT} does not run there: {done.stderr.strip()[-300:]}"
    else:
        try:  # the last line: what a login shell's own files say comes first
            found = parse_json(done.stdout.strip().rpartition("\n")[2])
        except ValueError:
            silent = f"answers, but not with a report: {done.stdout.strip()[-300:]!r}; its shell's start-up files must not print"
    if silent:
        return HostReport(host, slots, problems=(silent,))
    problems = [f"has {name} {found[name]}, here is {own}" for name, own in versions().items() if found[name] != own]
    if not found["sees"]:
        problems.append(f"does not see {shared}: run folders and data must lie on a file system that all hosts share")
    if found["gpus"] and found["gpus"] < slots:
        problems.append(f"has {found['gpus']} GPU(s) for slots={slots}")
    return HostReport(host, slots, found["gpus"], tuple(problems))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm hosts", description="The hosts of a job.")
    actions = parser.add_subparsers(dest="action", required=True)
    checking = actions.add_parser("check", help="does every host answer, with the same versions and files?")
    checking.add_argument("hostfile", type=Path)
    checking.add_argument("--shared", type=Path, default=Path("runs"), help="folder that all must see (default: runs)")
    actions.add_parser("export", help="shell commands to run before `deepspeed --hostfile`")
    reporting = actions.add_parser("report", help="what `check` asks each host for, as JSON")
    reporting.add_argument("sign", type=Path)
    return parser


@cli
def main(argv: list[str] | None = None) -> int:
    """Command line: check the hosts, or print what a shell must export before deepspeed."""
    arguments = make_parser().parse_args(argv)
    if arguments.action == "export":
        variables = launch_variables(os.environ)
        for name, value in variables.items():
            print(f"export {name}={shlex.quote(value)}")
        for name in own_secrets(os.environ):
            print(f"unset {name}")
        removal = shlex.quote(f"rm -f -- {shlex.quote(variables['DS_ENV_FILE'])}")
        print(f'case "$(trap)" in *EXIT*) ;; *) trap {removal} EXIT ;; esac')
    elif arguments.action == "report":
        gpus = len([file for file in Path("/dev").glob("nvidia*") if file.name[6:].isdigit()])
        print(json.dumps(versions() | {"sees": arguments.sign.exists(), "gpus": gpus}))
    else:
        reports = check(read_hostfile(arguments.hostfile), arguments.shared)
        print("\n".join(report.line(arguments.shared) for report in reports))
        return 1 if any(report.problems for report in reports) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main(None))
