"""Process groups: one way to start under python, the deepspeed launcher, torchrun and srun, and a few collectives.

No deepspeed here: torch's process group is made first and deepspeed.initialize adopts it. Numbers are exchanged as
float64 tensors, never as pickled objects.
"""

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps

import torch
import torch.distributed as dist

from data_pipeline.core.devices import flush_denormals
from data_pipeline.core.environment import launch, rendezvous
from data_pipeline.core.errors import UserError
from pretrain.ranks.addresses import choose_interface, is_loopback, own_address
from pretrain.ranks.build_locks import remove_stale_build_locks
from pretrain.ranks.launcher import free_port
from pretrain.ranks.meeting import meet
from pretrain.ranks.peers import LINK_TIMEOUT_S, Hub, Spoke, watch_peers

_peers: Hub | Spoke | None = None
"""This process's part in the watch over the job's ranks."""
_host_group: dist.ProcessGroup | None = None
"""Over which ranks exchange what their hosts know; None where the default group is one of hosts."""


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
    Raises UserError when the launcher's variables are incomplete or contradict one another; SystemExit when ranks have not come.
    """
    job = launch(os.environ)
    # One process has nobody to meet; deepspeed wants to be told where all the same.
    master, port = rendezvous(os.environ) if job.world_size > 1 else ("127.0.0.1", free_port())
    os.environ.update(job.variables() | {"MASTER_ADDR": master, "MASTER_PORT": str(port)})
    if torch.cuda.is_available():
        if job.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{socket.gethostname()} has {torch.cuda.device_count()} CUDA device(s) but a process of local rank "
                f"{job.local_rank}: start one per device (--num_gpus, slots= in the hostfile, --ntasks-per-node)"
            )
        device = torch.device("cuda", job.local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        flush_denormals()
    remove_stale_build_locks()
    address = own_address(master, several_hosts=job.local_world_size < job.world_size)
    choose_interface(address, loopback_only=job.local_world_size == job.world_size and is_loopback(master))
    timeout = timedelta(seconds=timeout_s)
    _give_new_groups_a_timeout(timeout)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=job.rank,
            world_size=job.world_size,
            timeout=timeout,
            # Of one process: no port that another program could take meanwhile.
            store=dist.HashStore() if job.world_size == 1 else meet(job, master, port, timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    host = socket.gethostname()
    global _peers, _host_group
    if job.world_size > 1 and _host_group is None and dist.get_backend() != "gloo":
        # Numbers that a host has and wants back go past the devices, whose queued work they would wait for.
        _host_group = dist.new_group(backend="gloo")
    if job.world_size > 1 and _peers is None:
        _peers = watch_peers(job.rank, job.world_size, host, address, _text_of_rank_0, quiet=job.local_rank > 0)
    return Topology(job.rank, job.local_rank, job.world_size, job.local_world_size, host, device)


def _give_new_groups_a_timeout(timeout: timedelta) -> None:
    """Let every process group that is made from here on have this timeout: DeepSpeed makes ZeRO's without one, so that a cut link
    would hang them for half an hour or for ever.
    """
    original: Callable = getattr(dist.new_group, "without_timeout", dist.new_group)

    @wraps(original)
    def new_group(ranks=None, given_timeout=None, *args, **kwargs):
        given = kwargs.pop("timeout", given_timeout)
        return original(ranks, timeout if given is None else given, *args, **kwargs)

    new_group.without_timeout = original  # type: ignore[attr-defined]
    for module in (dist, dist.distributed_c10d):
        module.new_group = new_group  # type: ignore[assignment,attr-defined]


def all_reduce_sum(values: Sequence[float]) -> list[float]:
    """Sums over all ranks, in float64, the same bits on every rank. One small collective between hosts; every rank must call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    total = torch.tensor(list(values), dtype=torch.float64)
    dist.all_reduce(total, group=_host_group)
    return total.tolist()


@dataclass(frozen=True)
class Together:
    """Work that ranks share out, or one process does alone: which of them this is, and how results come together.

    Attributes:
        total: sums a tensor of the host over all ranks; collective. Where each number is one rank's and 0 elsewhere, nothing is rounded.
    """

    rank: int = 0
    world_size: int = 1
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor

    @classmethod
    def of(cls, topology: Topology) -> "Together":
        """All ranks of the job."""
        return cls(topology.rank, topology.world_size, _total) if topology.world_size > 1 else cls()


ALONE = Together()
"""One process."""


def _total(tensor: torch.Tensor) -> torch.Tensor:
    summed = tensor.clone()
    dist.all_reduce(summed, group=_host_group)
    return summed


def any_rank(flag: bool) -> bool:
    """True on every rank if it is true on one."""
    return all_reduce_sum([float(flag)])[0] > 0


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_sum([0.0])


def bytes_of_rank_0(own: bytes) -> bytes:
    """Rank 0's bytes on every rank; those of other ranks are ignored. Collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    own = own if dist.get_rank() == 0 else b""
    sent = torch.zeros(int(all_reduce_sum([len(own)])[0]), dtype=torch.uint8)
    if own:
        sent.copy_(torch.frombuffer(bytearray(own), dtype=torch.uint8))
    if len(sent):
        dist.broadcast(sent, src=0, group=_host_group)
    return sent.numpy().tobytes()


def _text_of_rank_0(text: str) -> str:
    return bytes_of_rank_0(text.encode()).decode()


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
    global _peers, _host_group
    if _peers is not None:
        _peers.goodbye()
        _peers = None
    _host_group = None
    if dist.is_initialized():
        dist.destroy_process_group()
