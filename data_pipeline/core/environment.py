"""Who this process is among those that a launcher started: deepspeed, torchrun or srun, by their environment variables.

Only what a launcher gave to this very process counts. A batch script's own SLURM variables describe its allocation, and a shell
within a step (`srun --pty bash`) passes its task's on: python started by hand in either is one process.
"""

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from data_pipeline.core.errors import UserError

_FIRST_SPECIAL_STEP = 4294967290
"""Slurm's step ids from here on (2^32 - 6) are interactive shells, batch scripts and the like, not srun's tasks."""


@dataclass(frozen=True)
class Launch:
    """This process's place among the job's; one process by default. Ranks count from 0, local ones within this host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def variables(self) -> dict[str, str]:
        """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE, as deepspeed and torch read them."""
        numbers = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_SIZE": self.local_world_size,
        }
        return {name: str(number) for name, number in numbers.items()}


def launch(environ: Mapping[str, str]) -> Launch:
    """Read the launcher's variables. Raises: UserError when they are incomplete, no numbers, or contradict one another."""
    if "RANK" in environ:
        if "WORLD_SIZE" not in environ:
            raise UserError("RANK is set but WORLD_SIZE is not: start with deepspeed, torchrun or srun, or unset RANK")
        # deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE; without either all are taken to be on this host.
        local_size = next((name for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if name in environ), "WORLD_SIZE")
        local_rank = "LOCAL_RANK" if "LOCAL_RANK" in environ else "RANK"
        found = Launch(*(_number(environ, name) for name in ("RANK", "WORLD_SIZE", local_rank, local_size)))
    elif _is_task_of_srun(environ):
        found = Launch(
            rank=_number(environ, "SLURM_PROCID"),
            world_size=_tasks_of_step(environ),
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_world_size=_tasks_on_this_node(environ),
        )
    else:
        found = Launch()
    if not 0 <= found.rank < found.world_size:
        raise UserError(
            f"rank {found.rank} does not fit a job of {found.world_size} processes: start with deepspeed, torchrun or srun, or "
            "unset RANK and WORLD_SIZE"
        )
    return found


def rendezvous(environ: Mapping[str, str]) -> tuple[str, int]:
    """Name or address of rank 0's host and the port where the processes of a job of several meet.

    Raises: UserError when the environment does not say.
    """
    if "RANK" in environ:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise UserError(
                f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, or unset RANK"
            )
        return environ["MASTER_ADDR"], _number(environ, "MASTER_PORT")
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT")
    else:  # each job its own, of those that the kernel gives to nobody
        port = 20000 + _number(environ, "SLURM_JOB_ID") % 10000
    return environ.get("MASTER_ADDR") or _first_slurm_host(environ), port


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except KeyError:
        raise UserError(f"{name} is not set, which srun sets for each of its tasks: start with srun") from None
    except ValueError:
        raise UserError(f"{name} is {environ[name]!r}, expected a number: check the launcher's variables") from None


def _is_task_of_srun(environ: Mapping[str, str]) -> bool:
    """One of several tasks of a step, rather than a script or shell that holds the step's variables."""
    if not {"SLURM_STEP_ID", "SLURM_PROCID"} <= environ.keys() or "SLURM_PTY_PORT" in environ:
        return False
    return _tasks_of_step(environ) > 1 and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _tasks_of_step(environ: Mapping[str, str]) -> int:
    """SLURM_NTASKS may still be the allocation's, of which `srun -n 1` uses a part."""
    name = next((name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if name in environ), "")
    return _number(environ, name) if name else 1


def _tasks_on_this_node(environ: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is "4(x2),3": four tasks on each of the first two nodes, three on the third."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    counts = [int(count) for count, times in runs for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def _first_slurm_host(environ: Mapping[str, str]) -> str:
    """The first of the step's nodes, which Slurm writes as "login,gpu[007-010]". Raises: UserError where scontrol fails."""
    name = "SLURM_STEP_NODELIST" if environ.get("SLURM_STEP_NODELIST") else "SLURM_JOB_NODELIST"
    nodes = environ.get(name, "")
    if re.fullmatch(r"[\w.-]+", nodes):
        return nodes
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UserError(
            f"{name} is {nodes!r}, and `scontrol show hostnames`, which unfolds it, failed ({str(reason).strip()}): expected "
            "scontrol on the PATH of every task; or export MASTER_ADDR=<name of the first host> before srun"
        ) from None
