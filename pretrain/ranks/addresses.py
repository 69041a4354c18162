"""At which address, over which interface, the job's other hosts reach this one."""

import contextlib
import ipaddress
import os
import socket

import psutil

from data_pipeline.core.errors import UserError


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
    if several_hosts and is_loopback(address):
        with contextlib.suppress(OSError):
            return _source_address(socket.AF_INET, ("192.0.2.1", 9))  # an address that routers treat as foreign
        outward = [found for found in _interfaces() if not found.startswith("127.") and ":" not in found]
        return outward[0] if outward else address
    return address


def choose_interface(address: str, loopback_only: bool = False) -> None:
    """Let gloo use the interface that holds this address: by itself it takes what the host's name resolves to.

    Of a job that is reached at a loopback address only, gloo and NCCL listen there, and nobody else can call.
    """
    interface = _interfaces().get(address)
    if interface and (loopback_only or not is_loopback(address)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if loopback_only:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)


def is_loopback(host: str) -> bool:
    """Whether a name or address says itself that only this host reaches it; a name that happens to resolve so does not."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _source_address(family: int, target: tuple) -> str:
    """The address that a packet to `target` would be sent from, by the kernel's routes; no packet is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def _interfaces() -> dict[str, str]:
    """Name of the network interface by address, for all interfaces that are up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    held = {name: entries for name, entries in psutil.net_if_addrs().items() if name in up}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        e.address.partition("%")[0]: name for name, entries in held.items() for e in entries if e.family in families
    }
