"""The meeting of a job's ranks: who is missing is named, signals are heard meanwhile, and a taken port is one line."""

import contextlib
import os
import signal
import socket
import threading
import time

import psutil
import pytest
import torch.distributed as dist

from data_pipeline.core.environment import Launch
from data_pipeline.core.errors import UserError
from pretrain.ranks import meeting
from pretrain.ranks.launcher import free_port
from pretrain.ranks.meeting import meet
from pretrain.ranks.peers import EXIT_LOST


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(meeting, "SAY_S", 0.2)


def start(port: int, rank: int, world_size: int, timeout_s: float, stores: dict[int, dist.Store]) -> threading.Thread:
    def come() -> None:
        with contextlib.suppress(SystemExit):
            stores[rank] = meet(Launch(rank, world_size), "127.0.0.1", port, timeout_s, say=lambda _: None)

    thread = threading.Thread(target=come, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("agent", [False, True])
def test_all_meet_at_one_store(monkeypatch: pytest.MonkeyPatch, agent: bool) -> None:
    port, stores = free_port(), dict[int, dist.Store]()
    served = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if agent else None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(agent))
    for thread in [start(port, rank, 3, 60, stores) for rank in (2, 1, 0)]:
        thread.join(60)
    assert sorted(stores) == [0, 1, 2]
    stores[0].set("x", "7")
    assert stores[2].get("x") == b"7"
    assert agent == (served is not None)


def test_rank_0_names_who_is_missing_and_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SAY_S", 2.5)  # rank 1 has long come by then, on a busy machine too
    port, lines, others = free_port(), list[str](), dict[int, dist.Store]()
    start(port, 1, 6, 5, others)
    with pytest.raises(SystemExit) as ended:
        meet(Launch(0, 6), "127.0.0.1", port, 4.0, say=lines.append)
    assert ended.value.code == EXIT_LOST
    host = socket.gethostname()
    assert f"rank 0 waits at 127.0.0.1:{port} for rank(s) 2-5 of 6; there are 0 on {host}, 1 on {host}; if" in lines[0]
    assert "given up after 4 s" in lines[1]
    assert [line for line in lines if "\n" in line] == []
    assert not others


def test_another_rank_says_that_rank_0_is_not_there() -> None:
    port, lines = free_port(), list[str]()
    with pytest.raises(SystemExit):
        meet(Launch(3, 4), "127.0.0.1", port, 1.0, say=lines.append)
    assert lines[0] == f"rank 3 of 4 waits for rank 0 at 127.0.0.1:{port}; {meeting.BY_HAND}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_attack_12c_a_loopback_job_listens_on_loopback(host: str) -> None:
    """By itself torch's store listens on every address of the host."""
    port = free_port()
    store = meet(Launch(0, 1), host, port, 20.0)
    listening = {
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
    assert listening == {"127.0.0.1"}
    store.set("x", "7")
    assert store.get("x") == b"7"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_heard_while_others_are_awaited(rank: int) -> None:
    class Heard(Exception):
        """The handler's."""

    def hear(*_: object) -> None:
        raise Heard

    before = signal.signal(signal.SIGUSR2, hear)
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGUSR2])
    began = time.monotonic()
    try:
        timer.start()
        with pytest.raises(Heard):
            meet(Launch(rank, 2), "127.0.0.1", free_port(), 8.0, say=lambda _: None)
        assert time.monotonic() < began + 5
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of \S+, MASTER_PORT, is taken.*--master_port"):
            meet(Launch(0, 2), "127.0.0.1", port, 5.0)
