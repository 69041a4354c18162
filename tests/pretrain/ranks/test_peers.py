"""The hub among strangers; with real ranks and hosts it is tested in test_interruptions and test_two_hosts."""

import socket
import threading

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
        peers.encode(peers.Hello("wrong", "rank 1")),
        peers.encode(peers.End(1, "because I say so")),
    ],
)
def test_whoever_else_calls_is_hung_up_on_and_a_lost_rank_still_noticed(said: bytes) -> None:
    ended, codes = threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    hub = Hub(2, "here", "127.0.0.1", end)
    with socket.create_connection((hub.invitation.address, hub.invitation.port), timeout=20) as stranger:
        stranger.sendall(said)
        assert stranger.recv(100) == b""
    spoke = Spoke(1, "there", hub.invitation, quiet=True, exit_process=lambda code: None)
    assert spoke._connection is not None
    spoke._connection.shutdown(socket.SHUT_WR)  # as the kernel does for a process that was killed
    assert ended.wait(20)
    assert codes[0] == EXIT_LOST


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
