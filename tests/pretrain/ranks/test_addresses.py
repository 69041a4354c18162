"""Which interface the job's libraries use."""

import os

import pytest

from pretrain.ranks.addresses import choose_interface, is_loopback, own_address


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_what_only_this_host_reaches(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "node01", "localhost.example", "0.0.0.0", "::", ""])
def test_what_others_may_reach(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("alone", [True, False])
def test_attack_12c_gloo_and_nccl_of_a_loopback_job_stay_there(monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    choose_interface(own_address("127.0.0.1", several_hosts=False), loopback_only=alone)
    found = [os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")]
    assert found == (["lo", "lo"] if alone else [None, None])
