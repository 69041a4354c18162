"""Without a network the hub is tried once; a local path is never asked for there."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core import hub
from data_pipeline.core.errors import UserError


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses that were tried, in vain."""
    tried: list[Any] = []

    def connect(address: Any, timeout: float) -> socket.socket:
        tried.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", connect)
    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", *hub._PROXIES):
        monkeypatch.delenv(name, raising=False)
    hub.use_hub.cache_clear()
    yield tried
    hub.use_hub.cache_clear()


def test_one_attempt_sends_the_libraries_to_their_caches(
    attempts: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for _ in range(3):
        hub.use_hub()
    assert attempts == [("huggingface.co", 443)]
    assert constants.is_offline_mode()
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    assert "huggingface.co is out of reach ([Errno -2] Name or service not known)" in capsys.readouterr().err


def test_another_endpoint_is_the_one_that_is_tried(attempts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.test:8080/hf")
    hub.use_hub()
    assert attempts == [("mirror.test", 8080)]
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "https_proxy"])
def test_who_knows_better_is_left_alone(name: str, attempts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    hub.use_hub()
    assert attempts == []


@pytest.mark.parametrize("name", ["./x", "/x", "~/x", "../x/y", "runs/x/export", "export/", "x.json", "data/a.jsonl"])
def test_what_looks_like_a_path_is_one(name: str) -> None:
    with pytest.raises(UserError, match=r"^model .*: no such folder or file; expected a folder or a hub id$"):
        hub.check_hub_id(name, "model", "a folder or a hub id")
    hub.check_hub_id("Qwen/Qwen3-1.7B", "model", "")
    hub.check_hub_id("gpt2", "model", "")


def test_offline_a_tokenizer_of_the_hub_is_one_line_about_the_network(
    monkeypatch: pytest.MonkeyPatch, attempts: list[Any]
) -> None:
    """Not about a file that the repository would lack."""
    from huggingface_hub import constants

    from data_pipeline.text.tokenization import load_tokenizer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UserError, match=r"tokenizer no/such: neither a local path nor .*; check the name and the network"
    ):
        load_tokenizer("no/such")
    monkeypatch.delenv("HF_HUB_OFFLINE")


def test_attack_1c_without_the_hub_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.socket, "create_connection", lambda *_, **__: pytest.fail("the hub is asked"))
    hub.use_hub.cache_clear()
    with hub.without_hub():
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        hub.find_model("me/model", "no teacher at", "a hub id")
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    hub.use_hub.cache_clear()


@pytest.mark.parametrize("kind", ["huge", "pipe", "a file"])
def test_attack_1c_a_model_is_a_folder_whose_settings_have_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "a file":
        (tmp_path / "model").touch()
    else:
        (tmp_path / "model").mkdir()
    if kind == "pipe":
        os.mkfifo(tmp_path / "model" / "config.json")
    if kind == "huge":
        with open(tmp_path / "model" / "config.json", "wb") as file:
            file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"no teacher at model: .*expected a folder"):
        hub.find_model("model", "no teacher at", "a folder")
