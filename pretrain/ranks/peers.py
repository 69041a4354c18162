"""Every rank's connection to rank 0, over which a lost process or host is noticed, and named, within seconds.

Collective operations alone notice a killed rank late (NCCL) or a cut link after train.timeout_s, and say an address at
best. Nothing is sent while all is well: the kernel answers keepalive probes for a process that is busy or frozen, so only
a process that has ended or a host that is out of reach counts here; a frozen one is the watchdog's (faults.py).

Anybody may connect who reaches the port. Until he shows the token he gets `LINE_BYTES`, `HELLO_S` and one of `STRANGERS` places.
"""

import contextlib
import errno
import hmac
import json
import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline.core.outside import parse_json
from data_pipeline.core.telling import printable

EXIT_LOST = 88
LINK_TIMEOUT_S = 15.0
"""A host that has not answered for so long is given up."""
CONNECT_TIMEOUT_S = 3.0
"""How long rank 0, when it ends, waits for ranks that have its address and have not connected yet."""
PRINT_TIMEOUT_S = 5.0
"""Nobody may read a lost host's output any more, so printing may block; the process ends all the same."""
LINE_BYTES = 4096
"""Longest message."""
HELLO_S = 15.0
"""How long a connection may take to show the token."""
STRANGERS = 64
"""Connections without a token, besides as many as there are ranks, of which the oldest makes room for the next."""
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
UNREACHABLE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)


def watch_peers(
    rank: int,
    world_size: int,
    host: str,
    address: str,
    share: Callable[[str], str],
    quiet: bool = False,
    exit_process: Callable[[int], object] = os._exit,
) -> "Hub | Spoke":
    """Start this rank's watch. Collective.

    Args:
        address: of this host, one at which the other hosts reach it.
        share: gives rank 0's text to all ranks.
        quiet: end without a word when rank 0 has said why.
        exit_process: ends this process with a code, from another thread than the main one.
    """
    if rank == 0:
        hub = Hub(world_size, host, address, exit_process)
        share(json.dumps(asdict(hub.invitation)))
        return hub
    return Spoke(rank, host, Invitation(**json.loads(share(""))), quiet, exit_process)


@dataclass(frozen=True)
class Invitation:
    """Where rank 0 listens, the token by which it knows its own ranks, and its name."""

    address: str
    port: int
    token: str
    hub: str


@dataclass(frozen=True)
class Hello:
    """A rank shows the invitation's token and says its name."""

    token: str
    name: str


@dataclass(frozen=True)
class Bye:
    """The sender leaves in order: its silence from here on means nothing."""


@dataclass(frozen=True)
class End:
    """The job ends with this exit code; `linger_s` is how long a process may still take to say more by itself."""

    code: int
    why: str
    linger_s: float = 0.0


Message = Hello | Bye | End


def encode(message: Message) -> bytes:
    """One line of JSON, a long reason cut short."""
    fields = {name: value[:1000] if isinstance(value, str) else value for name, value in asdict(message).items()}
    return json.dumps({"kind": type(message).__name__, **fields}).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line. Raises: ValueError, KeyError, TypeError or AttributeError for anything else."""
    fields = parse_json(line)
    kinds = {kind.__name__: kind for kind in (Hello, Bye, End)}
    return kinds[fields.pop("kind")](**fields)


class _Side:
    """What both sides have in common: telling the others, and ending."""

    def __init__(self, rank: int, host: str, exit_process: Callable[[int], object]) -> None:
        self.name, self.done = f"rank {rank} on {host}", False
        self._exit_process = exit_process

    def _tell(self, message: Message) -> None:
        raise NotImplementedError

    def goodbye(self, code: int | None = None, linger_s: float = 0.0) -> None:
        """This process leaves the job: in order, or with an exit code that the others shall end with too.

        `linger_s` is how long they may still take to end by themselves, with more to say than that.
        """
        if not self.done:
            self.done = True
            self._tell(Bye() if code is None else End(code, self._left(code), linger_s))

    def _left(self, code: int) -> str:
        return f"{self.name} ended with exit code {code}; its own message says why"

    def _end(self, code: int, why: str, linger_s: float = 0.0, quiet: bool = False) -> None:
        if self.done:
            return
        self.done = True
        forced = threading.Timer(linger_s + PRINT_TIMEOUT_S, self._exit_process, [code])
        forced.daemon = True
        forced.start()
        self._tell(End(code, why, linger_s))
        time.sleep(linger_s)
        if not quiet:
            print(printable(f"{self.name}: {why}; exit code {code}"), file=sys.stderr, flush=True)
        self._exit_process(code)


@dataclass
class _Peer:
    """A connected rank, as the hub sees it; without a name until it has shown the invitation's token."""

    connection: socket.socket
    name: str = ""
    received: bytes = b""
    since: float = field(default_factory=time.monotonic)


class Hub(_Side):
    """Rank 0's side: one connection to each other rank."""

    def __init__(self, world_size: int, host: str, address: str, exit_process: Callable[[int], object]) -> None:
        super().__init__(0, host, exit_process)
        _allow_open_files(2 * world_size + STRANGERS)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=world_size + STRANGERS)
        self._listener.setblocking(False)
        self._awaited, self._closed = world_size - 1, False
        self._most_strangers = world_size + STRANGERS
        self._token, self._peers = secrets.token_hex(8), dict[socket.socket, _Peer]()
        self.invitation = Invitation(address, self._listener.getsockname()[1], self._token, self.name)
        threading.Thread(target=self._serve, name="peers", daemon=True).start()

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed:
                for key, _ in selector.select(timeout=1.0):
                    connection: Any = key.fileobj
                    if connection is self._listener:
                        if (accepted := self._accept()) is not None:
                            selector.register(accepted, selectors.EVENT_READ)
                    elif connection in self._peers and not self._read(self._peers[connection]):
                        self._awaited -= bool(self._peers[connection].name)  # it has left
                        self._drop(selector, connection)
                for connection in self._overdue():
                    self._drop(selector, connection)

    def _drop(self, selector: selectors.BaseSelector, connection: socket.socket) -> None:
        with contextlib.suppress(KeyError, ValueError):  # accepted by `_tell`, which registers none
            selector.unregister(connection)
        del self._peers[connection]
        connection.close()

    def _overdue(self) -> list[socket.socket]:
        """Connections that have not shown the token, in time or while there was room for them."""
        strangers = sorted((peer for peer in list(self._peers.values()) if not peer.name), key=lambda peer: peer.since)
        surplus = max(0, len(strangers) - self._most_strangers)
        now = time.monotonic()
        return [peer.connection for n, peer in enumerate(strangers) if n < surplus or now - peer.since > HELLO_S]

    def _accept(self) -> socket.socket | None:
        """The next connection; None if nobody has called, or hung up already."""
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in TOO_MANY_FILES:  # the call stays where it is, and would be noticed again at once
                time.sleep(0.1)
            return None
        connection.setblocking(True)
        _probe_when_silent(connection)
        self._peers[connection] = _Peer(connection)
        return connection

    def _read(self, peer: _Peer) -> bool:
        """Read what a peer has sent, or notice that it is lost; False if nothing more will come from it."""
        error = None
        try:
            received = peer.connection.recv(4096)
        except OSError as caught:
            error, received = caught, b""
        if not received:
            if peer.name:
                self._end(EXIT_LOST, _loss(peer.name, error))
            return False
        *lines, peer.received = (peer.received + received).split(b"\n")
        if max(map(len, (*lines, peer.received))) > LINE_BYTES:
            return self._is_lost(peer)
        try:
            return all(self._hear(peer, decode(line)) for line in lines)
        except (ValueError, KeyError, TypeError, AttributeError):  # not one of us
            return self._is_lost(peer)

    def _is_lost(self, peer: _Peer) -> bool:
        """What follows from nonsense: of a stranger nothing but that he is hung up on."""
        if peer.name:
            self._end(EXIT_LOST, f"{peer.name} sends what is no message")
        return False

    def _hear(self, peer: _Peer, message: Message) -> bool:
        if isinstance(message, Hello):
            if not hmac.compare_digest(message.token, self._token):
                return False
            peer.name = str(message.name)
            return True
        if isinstance(message, End) and peer.name:
            self._end(message.code, message.why, message.linger_s)
            return True
        return False

    def _tell(self, message: Message) -> None:
        """To every rank, also to those that are about to connect: not told, they would take this process's end for a loss."""
        told: set[socket.socket] = set()
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            while self._accept() is not None:
                pass
            for connection in list(self._peers):
                if connection not in told:
                    told.add(connection)
                    _send(connection, message)
            if len(told) >= self._awaited or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        self._closed = True


class Spoke(_Side):
    """Another rank's side: its connection to rank 0."""

    def __init__(
        self, rank: int, host: str, invitation: Invitation, quiet: bool, exit_process: Callable[[int], object]
    ) -> None:
        super().__init__(rank, host, exit_process)
        self._quiet = quiet
        self._hub = invitation.hub
        self._connection: socket.socket | None = None
        where = (invitation.address, invitation.port)
        try:
            self._connection = socket.create_connection(where, timeout=LINK_TIMEOUT_S)
        except OSError as error:
            print(f"{self.name} has no connection to {where}, so its loss would go unnoticed: {error}", file=sys.stderr)
            return
        self._connection.settimeout(None)
        _probe_when_silent(self._connection)
        _send(self._connection, Hello(invitation.token, self.name))
        threading.Thread(target=self._listen, args=(self._connection,), name="peers", daemon=True).start()

    def _listen(self, connection: socket.socket) -> None:
        error = None
        try:
            file = connection.makefile("rb")
            while line := file.readline(LINE_BYTES):
                message = decode(line)
                if isinstance(message, Bye):
                    self.done = True
                    return
                if isinstance(message, End):
                    self._end(message.code, message.why, message.linger_s, self._quiet)
        except OSError as caught:
            error = caught
        except (ValueError, KeyError, TypeError, AttributeError):
            self._end(EXIT_LOST, f"{self._hub} sends what is no message")
        self._end(EXIT_LOST, _loss(self._hub, error))

    def _tell(self, message: Message) -> None:
        if self._connection is not None:
            _send(self._connection, message)


def _allow_open_files(more: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(soft + more, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loss(name: str, error: OSError | None) -> str:
    if error is not None and error.errno in UNREACHABLE:
        return f"{name} has not answered for {LINK_TIMEOUT_S:.0f} s: its host is down, or the link to it"
    return f"{name} is gone without a word: killed, by hand or for its memory, or crashed"


def _probe_when_silent(connection: socket.socket) -> None:
    """Let the kernel ask for a sign of life, and report ETIMEDOUT when there is none for LINK_TIMEOUT_S."""
    third = int(LINK_TIMEOUT_S / 3)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", third), ("TCP_KEEPINTVL", third), ("TCP_KEEPCNT", 2)):
        if hasattr(socket, option):  # macOS lacks one of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * LINK_TIMEOUT_S))


def _send(connection: socket.socket, message: Message) -> None:
    with contextlib.suppress(OSError):  # who cannot be told notices by itself
        connection.sendall(encode(message))
