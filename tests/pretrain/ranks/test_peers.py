"""The hub among strangers; with real ranks and hosts it is tested in test_interruptions and test_two_hosts."""

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from data_pipeline.core.errors import EXIT_USER
from pretrain.ranks import peers
from pretrain.ranks.peers import EXIT_LOST, Hub, Spoke


@pytest.mark.parametrize(
    "said",
    [
        b"1\n",
        b"null\n",
        b'["token"]\n',
        b"{}\n",
        b"GET / HTTP/1.1\n",
        b'{"token": "wrong"}\n',
        b'{"kind": "Bye"}\n',
        b'{"kind": []}\n',
        b"[" * 4000 + b"\n",
        b"[" * 100_000 + b"\n",  # attack 5a: what its reader cannot nest
        b'{"a":' * 600 + b"\n",
        b"x" * 5000,  # attack 5b: a line without end
        b"\n" * 100,
        b'{"kind": "Hello", "token": 1, "name": "x"}\n',
        '{"kind": "Hello", "token": "\u00e4", "name": "x"}\n'.encode(),
        peers.encode(peers.Hello("wrong", "rank 1")),
        peers.encode(peers.End(1, "because I say so")),
    ],
)
def test_attack_5a_whoever_else_calls_is_hung_up_on_and_a_lost_rank_still_noticed(said: bytes) -> None:
    ended, codes = threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    hub = Hub(2, "here", "127.0.0.1", end)
    with socket.create_connection((hub.invitation.address, hub.invitation.port), timeout=20) as stranger:
        stranger.sendall(said)
        with contextlib.suppress(ConnectionResetError):  # not all of it was read
            assert stranger.recv(100) == b""
    spoke = Spoke(1, "there", hub.invitation, quiet=True, exit_process=lambda code: None)
    assert spoke._connection is not None
    spoke._connection.shutdown(socket.SHUT_WR)  # as the kernel does for a process that was killed
    assert ended.wait(20)
    assert codes[0] == EXIT_LOST


@pytest.fixture
def noticed() -> Iterator[tuple[Hub, Spoke, list[int], threading.Event]]:
    """A hub, a rank that is connected to it, and the codes that the hub ends with."""
    ended, codes = threading.Event(), list[int]()
    hub = Hub(2, "here", "127.0.0.1", lambda code: (codes.append(code), ended.set()))
    spoke = Spoke(1, "there", hub.invitation, quiet=True, exit_process=lambda code: None)
    while not any(peer.name for peer in list(hub._peers.values())):
        time.sleep(0.01)
    yield hub, spoke, codes, ended
    assert not codes
    spoke._connection.shutdown(socket.SHUT_WR)  # and still a lost rank is noticed
    assert ended.wait(20)
    assert codes[0] == EXIT_LOST


def test_attack_5b_an_endless_line_costs_little(noticed: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = noticed[0]
    monkeypatch.setattr(peers, "HELLO_S", 1000.0)  # it is not for its slowness that he is hung up on
    where = (hub.invitation.address, hub.invitation.port)
    with socket.create_connection(where, timeout=20) as stranger, pytest.raises(OSError, match=r"reset|Broken pipe"):
        stranger.sendall(bytes(1 << 24))  # more than the kernel's buffers take


def test_attack_5c_silent_connections_are_hung_up_on(noticed: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = noticed[0]
    monkeypatch.setattr(peers, "HELLO_S", 0.3)
    where = (hub.invitation.address, hub.invitation.port)
    with socket.create_connection(where, timeout=20) as one, socket.create_connection(where, timeout=20) as other:
        other.sendall(b"{")
        assert one.recv(100) == other.recv(100) == b""
    while len(hub._peers) > 1:  # the rank's own stays
        time.sleep(0.01)


def test_attack_5c_strangers_have_few_places_and_ranks_get_one(noticed: tuple) -> None:
    hub = noticed[0]
    where = (hub.invitation.address, hub.invitation.port)
    with ExitStack() as stack:
        strangers = [stack.enter_context(socket.create_connection(where, timeout=20)) for _ in range(200)]
        assert strangers[0].recv(100) == b""  # the oldest
        late = Spoke(2, "late", hub.invitation, quiet=True, exit_process=lambda code: None)
        while len([peer for peer in list(hub._peers.values()) if peer.name]) < 2:
            time.sleep(0.01)
        assert len(hub._peers) <= 2 + hub._most_strangers + 1
        late.goodbye()


def test_attack_5d_without_descriptors_the_hub_waits_instead_of_spinning(
    noticed: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, calls = noticed[0], list[float]()

    class Full:
        """A listener in a process that has no descriptor left."""

        def accept(self) -> None:
            calls.append(time.monotonic())
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(hub, "_listener", Full())
    for _ in range(3):
        assert hub._accept() is None
    assert calls[2] - calls[0] > 0.15


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_a_rank_that_is_not_connected_yet_ends_with_the_code_of_rank_0_too(late_s: float) -> None:
    """Rank 0 finds a user's mistake as soon as it has said where it listens."""
    hub = Hub(3, "here", "127.0.0.1", lambda code: None)
    codes, ended = dict[int, int](), {rank: threading.Event() for rank in (1, 2)}

    def connect(rank: int) -> None:
        def end(code: int) -> None:
            codes.setdefault(rank, code)
            ended[rank].set()

        Spoke(rank, "there", hub.invitation, quiet=True, exit_process=end)

    connect(1)
    threading.Timer(late_s, connect, [2]).start()
    hub.goodbye(EXIT_USER)
    hub._listener.close()  # and its process is gone
    for peer in list(hub._peers):
        peer.close()
    assert ended[1].wait(3)
    assert ended[2].wait(3)
    assert codes == {1: EXIT_USER, 2: EXIT_USER}


def test_ranks_that_have_left_are_not_waited_for() -> None:
    hub = Hub(2, "here", "127.0.0.1", lambda code: None)
    spoke = Spoke(1, "there", hub.invitation, quiet=True, exit_process=lambda code: None)
    spoke.goodbye()
    while hub._awaited or hub._peers:
        threading.Event().wait(0.01)
    ended = threading.Thread(target=hub.goodbye)
    ended.start()
    ended.join(peers.CONNECT_TIMEOUT_S / 2)
    assert not ended.is_alive()
