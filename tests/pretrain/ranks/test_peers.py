"""The hub among strangers; with real ranks and hosts it is tested in test_interruptions and test_two_hosts."""

import json
import socket
import threading

import pytest

from pretrain.ranks.peers import EXIT_LOST, Hub, Spoke


@pytest.mark.parametrize(
    "said", [b"1\n", b"null\n", b'["token"]\n', b"{}\n", b"GET / HTTP/1.1\n", b'{"token": "wrong"}\n']
)
def test_whoever_else_calls_is_hung_up_on_and_a_lost_rank_still_noticed(said: bytes) -> None:
    ended, codes = threading.Event(), list[int]()

    def end(code: int) -> None:
        codes.append(code)
        ended.set()

    hub = Hub(2, "here", "127.0.0.1", end)
    invitation = json.loads(hub.invitation)
    with socket.create_connection((invitation["address"], invitation["port"]), timeout=20) as stranger:
        stranger.sendall(said)
        assert stranger.recv(100) == b""
    spoke = Spoke(1, "there", invitation, quiet=True, exit_process=lambda code: None)
    assert spoke._connection is not None
    spoke._connection.shutdown(socket.SHUT_WR)  # as the kernel does for a process that was killed
    assert ended.wait(20)
    assert codes[0] == EXIT_LOST
