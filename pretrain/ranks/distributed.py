"""Process groups: one way to start under python, the deepspeed launcher, torchrun and srun, and a few collectives.

No deepspeed here: torch's process group is made first and deepspeed.initialize adopts it. Numbers are exchanged as
float64 tensors, never as pickled objects.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from data_pipeline.core.errors import UserError
from pretrain.ranks.launcher import free_port
from pretrain.ranks.peers import LINK_TIMEOUT_S, Hub, Spoke, watch_peers

LOCK_AGE_S = 900
"""A lock of torch's extension builder older than this is of a killed build (the longest real one takes 5 minutes)."""
SHARED_TEXT_BYTES = 512

_peers: Hub | Spoke | None = None
"""This process's part in the watch over the job's ranks."""


@dataclass(frozen=True)
class Topology:
    """Who this process is: its rank in the job and on its host, and the device it computes on."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    hostname: str = "localhost"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0


def init_distributed(timeout_s: float = 1800.0) -> Topology:
    """Join the job that the environment describes, or start a job of one process if it describes none.

    gloo on CPUs, nccl on CUDA devices. Every process group made later, ZeRO's own included, gets `timeout_s` too. From
    here on a rank that ends without `shutdown` or `goodbye`, or is out of reach, ends all the others (peers.py).
    Raises UserError when the launcher's variables are incomplete or contradict one another.
    """
    environment = launch_environment(os.environ)
    os.environ.update(environment)
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank, local_world_size = int(environment["LOCAL_RANK"]), int(environment["LOCAL_SIZE"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()} has {torch.cuda.device_count()} CUDA device(s) but a process of local rank "
                f"{local_rank}: start one per device (--num_gpus, slots= in the hostfile, --ntasks-per-node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    remove_stale_build_locks()
    address = own_address(environment["MASTER_ADDR"], several_hosts=local_world_size < world_size)
    choose_interface(address)
    timeout = timedelta(seconds=timeout_s)
    _give_new_groups_a_timeout(timeout)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            # One process has nobody to meet: no port that another program could take meanwhile.
            store=dist.HashStore() if world_size == 1 else None,
            device_id=device if device.type == "cuda" else None,
        )
    host = socket.gethostname()
    global _peers
    if world_size > 1 and _peers is None:
        _peers = watch_peers(rank, world_size, host, address, _text_of_rank_0, quiet=local_rank > 0)
    return Topology(rank, local_rank, world_size, local_world_size, host, device)


def launch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The launcher's variables as RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR, MASTER_PORT.

    Understands deepspeed's and torchrun's (they set RANK) and srun's (SLURM_*); none of them means one process on a
    free port. A batch script's own SLURM variables do not count: only srun sets SLURM_STEP_ID.
    """
    if "RANK" in environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            raise UserError(
                f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, or unset RANK"
            )
        local_size = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE") or environ["WORLD_SIZE"]
        found = {name: environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        found |= {"LOCAL_RANK": environ.get("LOCAL_RANK", environ["RANK"]), "LOCAL_SIZE": local_size}
    elif "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", 1)) > 1:
        nodes = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        found = {
            "RANK": environ["SLURM_PROCID"],
            "WORLD_SIZE": environ["SLURM_NTASKS"],
            "LOCAL_RANK": environ["SLURM_LOCALID"],
            "LOCAL_SIZE": _tasks_on_this_node(environ),
            "MASTER_ADDR": environ.get("MASTER_ADDR") or first_slurm_host(nodes),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 10000),
        }
    else:
        found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if not 0 <= int(found["RANK"]) < int(found["WORLD_SIZE"]):
        raise UserError(
            f"RANK={found['RANK']} does not fit WORLD_SIZE={found['WORLD_SIZE']}: check the launcher's variables"
        )
    return found


def first_slurm_host(nodelist: str) -> str:
    """First host of Slurm's compressed list: "node[03-07,9],login" -> "node03"."""
    prefix, bracket, rest = nodelist.partition("[")
    if not bracket or "," in prefix:
        return nodelist.split(",")[0]
    number = re.split(r"[,\-\]]", rest)[0]
    suffix = rest.partition("]")[2].split(",")[0]
    return f"{prefix}{number}{suffix}"


def _tasks_on_this_node(environ: Mapping[str, str]) -> str:
    """SLURM_STEP_TASKS_PER_NODE is "4(x2),3": four tasks on each of the first two nodes, three on the third."""
    counts: list[str] = []
    for part in (environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1")).split(","):
        count, _, repeat = part.partition("(x")
        counts += [count] * int(repeat.rstrip(")") or 1)
    node = int(environ.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else counts[-1]


def own_address(master: str, several_hosts: bool) -> str:
    """This host's address on the way to `master`, a name or address.

    A host that takes its own name for 127.0.1.1, as Debian's do, is asked for its address on the way out instead, when
    there are other hosts to be reached from.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        address = _source_address(family, target)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR is {master}, which {socket.gethostname()} cannot reach ({error}): expected a name or address of"
            " the first host that all hosts know; give deepspeed or torchrun another one with --master_addr"
        ) from None
    if several_hosts and (address.startswith("127.") or address == "::1"):
        with contextlib.suppress(OSError):
            return _source_address(socket.AF_INET, ("192.0.2.1", 9))  # an address that routers treat as foreign
        outward = [found for found in _interfaces() if not found.startswith("127.") and ":" not in found]
        return outward[0] if outward else address
    return address


def choose_interface(address: str) -> None:
    """Let gloo use the interface that holds this address: by itself it takes what the host's name resolves to."""
    interface = _interfaces().get(address)
    if interface and not address.startswith("127.") and address != "::1":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _source_address(family: int, target: tuple) -> str:
    """Of a packet to `target`; none is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def _interfaces() -> dict[str, str]:
    """Address -> name of its interface, of all that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    held = {name: entries for name, entries in psutil.net_if_addrs().items() if name in up}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        e.address.partition("%")[0]: name for name, entries in held.items() for e in entries if e.family in families
    }


def remove_stale_build_locks() -> list[Path]:
    """Delete locks that killed builds of torch extensions left behind: each would hang the next start silently."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    removed = []
    for lock in folder.glob("**/lock") if folder.is_dir() else ():
        try:
            if time.time() - lock.stat().st_mtime > LOCK_AGE_S:
                lock.unlink()
                removed.append(lock)
        except FileNotFoundError:  # another rank was faster
            continue
    return removed


def _give_new_groups_a_timeout(timeout: timedelta) -> None:
    """DeepSpeed makes ZeRO's groups without a timeout; a cut link would hang them for half an hour or for ever."""
    original: Callable = getattr(dist.new_group, "without_timeout", dist.new_group)

    @wraps(original)
    def new_group(ranks=None, given_timeout=None, *args, **kwargs):
        given = kwargs.pop("timeout", given_timeout)
        return original(ranks, timeout if given is None else given, *args, **kwargs)

    new_group.without_timeout = original  # type: ignore[attr-defined]
    for module in (dist, dist.distributed_c10d):
        module.new_group = new_group  # type: ignore[assignment,attr-defined]


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, in float64, the same bits on every rank. One small collective; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(list(values), dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    return total.tolist()


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    return all_reduce_sum([float(flag)])[0] > 0


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_sum([0.0])


def _text_of_rank_0(text: str) -> str:
    """Rank 0's text, on every rank. Collective."""
    own = text.encode().ljust(SHARED_TEXT_BYTES) if dist.get_rank() == 0 else bytes(SHARED_TEXT_BYTES)
    return bytes(map(int, all_reduce_sum(own))).decode().rstrip()


def goodbye(code: int, linger_s: float = 0.0) -> None:
    """Tell the other ranks that this one is about to end with an exit code, so that they end with the same.

    They do so after `linger_s`, for which they may go on with what they have to write down.
    """
    if _peers is not None:
        _peers.goodbye(code, linger_s)


def await_cause() -> None:
    """After a failed collective operation: give the watch time to name the lost rank or host, and to end this process."""
    if _peers is not None:  # one that is done may be about to say so: to go on would be to end before its message
        time.sleep(LINK_TIMEOUT_S + 3)


def shutdown() -> None:
    """Leave the job."""
    global _peers
    if _peers is not None:
        _peers.goodbye()
        _peers = None
    if dist.is_initialized():
        dist.destroy_process_group()


def _collective_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
