"""Hosts on one machine: network namespaces behind a bridge, each with its own name, processes and sshd.

They share this machine's files, as hosts of a cluster share a file system. Everything lives in a given folder and in
namespaces that end with this process, however it ends. Needs root, iproute2, util-linux, openssh-server and pdsh.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
REPOSITORY = Path(__file__).resolve().parents[2]
PYTHONPATH = f"{REPOSITORY / 'tests' / 'launchers'}:{REPOSITORY}"
"""For launchers and what they start."""
PROGRAMS = ("ip", "unshare", "nsenter", "setpriv", "mount", "ssh", "ssh-keygen", "pdsh", "hostname")
SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
INTERFACE = "lan0"


def what_is_missing() -> str | None:
    """Why no hosts can be made here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None] + ([] if SSHD else ["sshd"])
    if missing:
        return f"{', '.join(missing)} not found (apt-get install iproute2 openssh-server openssh-client pdsh)"
    if os.geteuid() != 0:
        return "network namespaces with an sshd each need root"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link", "add", "type", "bridge"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    return f"no network namespaces or bridges here: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Host:
    """One of them: its name and address, and the process of this machine that is the first in its namespaces."""

    name: str
    address: str
    init: int

    def enter(self, argv: list[str], cwd: Path = REPOSITORY) -> list[str]:
        """The command that runs `argv` on this host."""
        namespaces = ["--net", "--uts", "--mount", "--pid"]
        inside = ["sh", "-c", 'cd "$0" && exec "$@"', str(cwd)]
        return ["nsenter", "--target", str(self.init), *namespaces, "--", *inside, *argv]

    def processes(self, argument: str) -> dict[int, list[str]]:
        """This host's living processes with `argument` in their command lines: process id here -> command line."""
        own = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdigit() and (folder / "ns" / "pid").stat().st_ino == own:
                    command = (folder / "cmdline").read_bytes().decode().split("\0")  # a zombie's is empty
                    if any(argument in word for word in command):
                        found[int(folder.name)] = command
        return found

    def ranks(self) -> list[int]:
        """Process ids of the training processes proper."""
        return [pid for pid, argv in self.processes("train.py").items() if is_rank(argv)]

    def job(self) -> list[int]:
        """Those, and those of the launcher that deepspeed runs on every host."""
        found = self.processes("train.py")
        return [pid for pid, argv in found.items() if is_rank(argv) or "deepspeed.launcher.launch" in " ".join(argv)]


def is_rank(argv: list[str]) -> bool:
    """Whether a command line is that of a training process proper."""
    return argv[1:2] == ["-u"] and argv[2].endswith("train.py")


@dataclass
class Network:
    """`hosts` in the order of `hostfile`; `environment` finds the ssh that knows them."""

    folder: Path
    hosts: list[Host]
    hostfile: Path
    environment: dict[str, str]
    switch: int

    def start(self, host: Host, argv: list[str], log: Path, environment: Mapping[str, str] = {}) -> subprocess.Popen:
        """Start a command on a host, its output going to `log`."""
        with open(log, "w") as file:
            return subprocess.Popen(
                host.enter(argv), env={**self.environment, **environment}, stdout=file, stderr=subprocess.STDOUT
            )

    def set_link(self, host: Host, state: str) -> None:
        """Pull a host's cable out of the switch, or put it back: "down" or "up"."""
        run(["nsenter", "--target", str(self.switch), "--net", "ip", "link", "set", host.name, state])

    def boot(self, host: Host, stack: ExitStack) -> None:
        """Start a host, for the first time or after `kill(host.init)`, until `stack` is left."""
        host.init = stack.enter_context(namespaces(["--net", "--uts", "--mount", "--pid", "--mount-proc"]))
        connect(host, self.switch)
        start_sshd(host, self.hosts, self.folder)


@contextmanager
def made_hosts(folder: Path, count: int = 2) -> Iterator[Network]:
    """host1, host2 and so on, 10.77.0.1, 10.77.0.2 ..., reachable by name and by ssh from one another."""
    folder.mkdir(parents=True, exist_ok=True)
    hosts = [Host(f"host{number}", f"10.77.0.{number}", 0) for number in range(1, count + 1)]
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    write_ssh_files(folder)
    with ExitStack() as stack:
        switch = stack.enter_context(namespaces(["--net"]))
        run(["nsenter", "--target", str(switch), "--net", "ip", "link", "add", "br0", "type", "bridge"])
        run(["nsenter", "--target", str(switch), "--net", "ip", "link", "set", "br0", "up"])
        environment = {
            **os.environ,
            "PYTHONPATH": PYTHONPATH,
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        network = Network(folder, hosts, hostfile, environment, switch)
        for host in hosts:
            network.boot(host, stack)
        yield network


@contextmanager
def namespaces(kinds: list[str]) -> Iterator[int]:
    """New namespaces, with the id of the first process in them; with that process, everything in them ends."""
    end_with_parent = ["setpriv", "--pdeathsig", "KILL"]
    process = subprocess.Popen([*end_with_parent, "unshare", *kinds, "--fork", "--kill-child", "sleep", "infinity"])
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def first() -> int | None:
            ids = children.read_text().split()
            ready = ids and Path(f"/proc/{ids[0]}/cmdline").read_bytes().startswith(b"sleep")
            return int(ids[0]) if ready else None

        yield wait_for(first, 10, "unshare did not start")
    finally:
        with contextlib.suppress(ProcessLookupError, ValueError, OSError):
            kill(int(children.read_text()))
        process.kill()
        process.wait()


def connect(host: Host, switch: int) -> None:
    """A cable from the host's only interface to the switch's port of its name."""
    port, inside = ["nsenter", "--target", str(switch), "--net"], ["nsenter", "--target", str(host.init), "--net"]
    peer = ["peer", "name", INTERFACE, "netns", str(host.init)]
    run([*port, "ip", "link", "add", host.name, "type", "veth", *peer])
    run([*port, "ip", "link", "set", host.name, "master", "br0", "up"])
    run([*inside, "ip", "address", "add", f"{host.address}/24", "dev", INTERFACE])
    for interface in ("lo", INTERFACE):
        run([*inside, "ip", "link", "set", interface, "up"])


def start_sshd(host: Host, hosts: list[Host], folder: Path) -> None:
    """Give the host its name, its own /etc/hosts (which, as on Debian, takes its own name for 127.0.1.1), and an sshd."""
    table = folder / f"{host.name}.hosts"
    lines = [f"{'127.0.1.1' if other is host else other.address} {other.name}" for other in hosts]
    table.write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
    script = f"""
        hostname {host.name}
        mount -t tmpfs none /run && mkdir /run/sshd
        mount --bind {table} /etc/hosts
        exec {SSHD} -f /dev/null -E {folder}/{host.name}.sshd.log -h {folder}/host_key \
            -o AuthorizedKeysFile={folder}/user_key.pub -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes \
            -o PidFile=none
    """
    run(host.enter(["sh", "-ec", script]))


def write_ssh_files(folder: Path) -> None:
    """Keys, and an `ssh` for the front of PATH that uses them instead of the user's own."""
    for key in ("host_key", "user_key"):
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)])
    (folder / "ssh_config").write_text(
        f"Host *\n  User root\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  BatchMode yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def run(argv: list[str]) -> str:
    """Run a command that must succeed; its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def wait_for(condition: Callable[[], T | None], seconds: float, otherwise: str, poll_s: float = 0.05) -> T:
    """What `condition` returns once it is true. Raises: TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {seconds:.0f} s")
        time.sleep(poll_s)
    return found


@contextmanager
def held(hosts: Sequence[Host]) -> Iterator[None]:
    """Stop the training processes of these hosts for as long: a fast machine would be through with its steps before what comes next."""
    ranks = [pid for host in hosts for pid in host.ranks()]
    assert len(ranks) == len(hosts)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """kill -9 of one process."""
    os.kill(pid, signal.SIGKILL)
