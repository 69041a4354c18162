"""An account without a home folder or a name gets both, and what lies in a read-only home stays where it is."""

import getpass
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from data_pipeline.core import home
from data_pipeline.core.home import CACHES, HUB, settle_home, temporary_home
from data_pipeline.core.storage import user_cache


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Variables as they were, and a temporary folder of the test's own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with mock.patch.dict(os.environ):
        for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", *CACHES):
            os.environ.pop(name, None)
        yield


def unknown_account(*_: object) -> None:
    raise KeyError("getpwuid(): uid not found: 12345")


def only_writable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """As for a user who may write there alone; the tests' user may be root."""
    monkeypatch.setattr(
        home.os, "access", lambda place, _: any(Path(place).is_relative_to(folder) for folder in folders)
    )


def test_a_number_without_an_account_has_a_home_and_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwuid", unknown_account)
    assert user_cache() == tmp_path / "tmp" / f"textldm-{os.getuid()}" / ".cache" / "textldm"
    assert Path.home() == temporary_home()
    assert getpass.getuser() == f"uid-{os.getuid()}"
    assert temporary_home().stat().st_mode & 0o777 == 0o700


def test_a_home_that_is_not_there_is_replaced(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path / "nowhere")
    settle_home()
    assert Path.home() == temporary_home()


def test_a_home_that_can_be_written_stays(tmp_path: Path) -> None:
    os.environ["HOME"] = str(tmp_path)
    settle_home()
    assert Path.home() == tmp_path
    assert user_cache() == tmp_path / ".cache" / "textldm"
    assert not os.environ.keys() & CACHES.keys()


@pytest.mark.parametrize("planted", ["open to all", "open to the group", "a link", "a file", "another's"])
def test_attack_4_a_temporary_home_that_somebody_else_made_first_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """Its name is known: whoever comes first could leave caches and code there, or read what is written."""
    known = tmp_path / "tmp" / f"textldm-{os.getuid()}"
    if planted == "a link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        known.symlink_to(tmp_path / "theirs")
    elif planted == "a file":
        known.touch()
    else:
        known.mkdir()
        known.chmod({"open to all": 0o777, "open to the group": 0o770}.get(planted, 0o700))
    if planted == "another's":
        other = os.getuid() + 1
        known.rename(tmp_path / "tmp" / f"textldm-{other}")
        monkeypatch.setattr(os, "getuid", lambda: other)
    found = temporary_home()
    assert found.parent == tmp_path / "tmp"
    assert found.name != f"textldm-{os.getuid()}"
    assert found.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["open to all", "another's", ""])
def test_attack_4_a_cache_that_somebody_else_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    """As where XDG_CACHE_HOME is a folder of several users."""
    os.environ["HOME"], os.environ["XDG_CACHE_HOME"] = str(tmp_path), str(tmp_path / "shared")
    cache = tmp_path / "shared" / "textldm"
    cache.mkdir(parents=True)
    cache.chmod(0o777 if planted == "open to all" else 0o755)
    if planted == "another's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(cache, 12345, -1)
    assert (user_cache() == cache) is (planted == "")


@pytest.mark.parametrize("models", [True, False])
def test_of_a_read_only_home_only_the_caches_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: bool
) -> None:
    os.environ["HOME"], os.environ["TRITON_CACHE_DIR"] = str(tmp_path), "/users/own"
    if models:
        (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".config").mkdir()
    only_writable(monkeypatch, tmp_path / "tmp", tmp_path / ".config")
    settle_home()
    assert Path.home() == tmp_path  # .netrc, .ssh, .deepspeed_env
    assert (HUB in os.environ) != models
    assert os.environ["WANDB_CACHE_DIR"] == str(temporary_home() / ".cache" / "wandb")
    assert "WANDB_CONFIG_DIR" not in os.environ
    assert os.environ["TRITON_CACHE_DIR"] == "/users/own"
    assert user_cache().is_relative_to(tmp_path / "tmp")


def test_another_users_folder_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "tmp" / f"textldm-{os.getuid()}").symlink_to(tmp_path / "theirs")
    assert temporary_home() != tmp_path / "tmp" / f"textldm-{os.getuid()}"
    assert temporary_home().stat().st_mode & 0o777 == 0o700
