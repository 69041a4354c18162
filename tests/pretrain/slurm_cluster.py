"""Slurm on the hosts of `made_hosts`: a controller on the first, a slurmd on each, one munged for all, which share this machine's files.

Everything lives in a given folder and in the hosts' namespaces, and ends with these. Needs what `made_hosts` needs, munge, slurmctld
and slurmd.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.pretrain import made_hosts
from tests.pretrain.made_hosts import REPOSITORY, Network, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "salloc", "scontrol", "scancel", "sinfo", "squeue")
CPUS = 2
"""Of every host, as it is told to Slurm."""


def what_is_missing() -> str | None:
    """Why there can be no Slurm here, or None."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found (apt-get install munge slurmctld slurmd slurm-client)"
    return made_hosts.what_is_missing()


@dataclass
class Slurm:
    """A running cluster; `environment` holds what its commands need."""

    folder: Path
    network: Network
    environment: dict[str, str]

    def command(self, *argv: str, environment: Mapping[str, str] = {}, timeout_s: float = 300) -> str:
        """Run a command on the first host that must succeed; its output, stderr included."""
        done = subprocess.run(
            self.network.hosts[0].enter(list(argv)), env={**self.environment, **environment}, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv}: exit code {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    def submit(self, *argv: str, environment: Mapping[str, str] = {}) -> str:
        """sbatch; the job's id."""
        return self.command("sbatch", "--parsable", *argv, environment=environment).strip()

    def state(self, job: str) -> str:
        """Of a job, such as RUNNING; of an array the states of all its tasks, each once."""
        lines = self.command("scontrol", "--oneliner", "show", "job", job).splitlines()
        return " ".join(sorted({field(line, "JobState") for line in lines if "JobState=" in line}))

    def exit_code(self, job: str) -> str:
        """As Slurm writes it, "85:0"."""
        return field(self.command("scontrol", "--oneliner", "show", "job", job), "ExitCode")

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        return int(field(self.command("scontrol", "--oneliner", "show", "job", job), "Restarts"))

    def await_end(self, job: str, seconds: float) -> None:
        """Until the job, or every task of the array, has completed with exit code 0."""

        def ended() -> str | None:
            state = self.state(job)
            return (
                state
                if not {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"} & set(state.split())
                else None
            )

        assert wait_for(ended, seconds, f"job {job} did not end", poll_s=0.3) == "COMPLETED"


def field(line: str, name: str) -> str:
    """The value of NAME=VALUE in a line of scontrol."""
    return next(word.partition("=")[2] for word in line.split() if word.startswith(f"{name}="))


@contextmanager
def slurm_cluster(network: Network) -> Iterator[Slurm]:
    """A cluster of all hosts, idle."""
    folder = network.folder / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    socket, key = folder / "munge", folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    names = ",".join(host.name for host in network.hosts)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        f"""
        ClusterName=made
        SlurmctldHost={network.hosts[0].name}
        SlurmUser=root
        AuthInfo=socket={socket},cred_expire=5
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_CPU
        SchedulerType=sched/builtin
        SchedulerParameters=sched_interval=1,batch_sched_delay=0
        SlurmdParameters=config_overrides
        MpiDefault=none
        MailProg=/bin/true
        ReturnToService=2
        StateSaveLocation={folder}/state
        SlurmdSpoolDir={folder}/spool/%n
        SlurmctldPidFile={folder}/slurmctld.pid
        SlurmdPidFile={folder}/slurmd-%n.pid
        SlurmctldLogFile={folder}/slurmctld.log
        SlurmdLogFile={folder}/slurmd-%n.log
        NodeName={names} CPUs={CPUS} State=UNKNOWN
        PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
    """.replace("\n        ", "\n")
    )
    path = f"{network.environment['PATH']}:/usr/sbin"
    slurm = Slurm(folder, network, {**network.environment, "PATH": path, "SLURM_CONF": str(configuration)})
    munged = ["munged", "--force", f"--socket={socket}", f"--key-file={key}", f"--pid-file={folder}/munged.pid"]
    slurm.command(*munged, f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log")
    slurm.command("slurmctld")
    for host in network.hosts:
        subprocess.run(
            host.enter(["slurmd", "-N", host.name], REPOSITORY), env=slurm.environment, check=True, timeout=60
        )

    def idle() -> bool:
        return slurm.command("sinfo", "--noheader", "--format=%T %D").split() == ["idle", str(len(network.hosts))]

    wait_for(idle, 60, f"the nodes are not idle: {folder}", poll_s=0.2)
    yield slurm
