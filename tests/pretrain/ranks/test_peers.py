"""The hub among strangers; with real ranks and hosts it is tested in test_interruptions and test_two_hosts."""

import socket
import threading

import pytest

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
