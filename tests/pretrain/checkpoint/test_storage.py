"""Where checkpoints lie is a matter of five calls: a storage from outside serves saving, resuming and reading alike."""

import errno
import io
from pathlib import Path
from typing import BinaryIO, ClassVar

import pytest
import torch

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.find import (
    checkpoint_at,
    checkpoint_of,
    discard_after,
    had_checkpoints,
    newest_complete,
    saved_steps,
    unfinished,
)
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.checkpoint.read import read_tensors, restore, verify
from pretrain.checkpoint.storage import CHECKPOINTS, Content, Folder, storage_of
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.ranks.distributed import Topology
from tests.installed_package import install
from tests.pretrain.bare_engine import bare_engine, save, silent, states_of


class Memory:
    """A storage in this process's memory, of a limited size."""

    places: ClassVar[dict[str, dict[str, dict[str, bytes]]]] = {}

    def __init__(self, place: str) -> None:
        if place.endswith("/unreachable"):
            raise ConnectionError("nobody answers")
        self.place, self.limit = place, 1 << 30
        self.checkpoints = self.places.setdefault(place, {})

    def __str__(self) -> str:
        return f"memory:{self.place}"

    def put(self, checkpoint: str, file: str, content: Content) -> None:
        whole = b"".join(content)
        if len(whole) > self.limit:
            raise OSError(errno.ENOSPC, "No space left")
        self.checkpoints.setdefault(checkpoint, {})[file] = whole

    def read(self, checkpoint: str, file: str) -> BinaryIO:
        if file not in self.checkpoints.get(checkpoint, {}):
            raise FileNotFoundError(file)
        return io.BytesIO(self.checkpoints[checkpoint][file])

    def commit(self, unfinished: str, name: str) -> None:
        self.checkpoints[name] = self.checkpoints.pop(unfinished)

    def list(self) -> list[str]:
        return list(self.checkpoints)

    def remove(self, checkpoint: str) -> None:
        self.checkpoints.pop(checkpoint, None)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose checkpoints lie in memory, by a storage that an installed package brings along."""
    install(tmp_path / "site", monkeypatch, "textldm.checkpoint_storages", memory=f"{__name__}:Memory")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINTS).write_text(f"memory:{tmp_path}\n")
    return tmp_path / "run"


def test_a_storage_from_outside_does_all_that_the_folder_does(run: Path):
    writer, engine = CheckpointWriter(run, Topology(), keep_last=2), bare_engine(seed=3)
    for step in (1, 2, 3):
        engine.updates = step
        writer.save(step, engine, {})
    writer.wait()
    assert saved_steps(run) == [3, 2]
    assert not [path for path in run.rglob("*") if path.name != CHECKPOINTS]
    found = newest_complete(run)
    assert found is not None
    assert str(found) == f"memory:{run.parent}/step-000000003"
    assert verify(found).updates == 3
    other = bare_engine(seed=4)
    assert restore(found, other).step == 3
    expected = states_of(engine)
    assert all(torch.equal(expected[name], tensor) for name, tensor in states_of(other).items())
    assert torch.equal(read_tensors(run, "ema")["scale"], expected["ema/scale"])
    discard_after(run, 2)
    assert str(checkpoint_of(run)) == str(checkpoint_at(run, 2))
    assert had_checkpoints(run)


def test_damage_and_unfinished_saves_are_passed_over_in_it_too(run: Path):
    for step in (1, 2):
        save(run, step, bare_engine(seed=step))
    storage = storage_of(run)
    damaged = bytearray(storage.read("step-000000002", "rank-00000.safetensors").read())
    damaged[len(damaged) // 2] ^= 1
    storage.put("step-000000002", "rank-00000.safetensors", [bytes(damaged)])
    storage.put("step-000000003.partial", MANIFEST, [b"{}"])
    reports: list[str] = []
    found = newest_complete(run, report=reports.append)
    assert found is not None
    assert found.name == "step-000000001"
    assert "step-000000003.partial passed over" in reports[0]
    assert "step-000000002 passed over" in reports[1]
    CheckpointWriter(run, Topology())
    assert "step-000000003.partial" not in storage.list()


def test_one_that_is_full_costs_one_save(run: Path, capsys: pytest.CaptureFixture[str]):
    writer, engine = CheckpointWriter(run, Topology()), bare_engine()
    writer.save(1, engine, {}, blocking=True)
    writer.storage.limit = 1000
    writer.save(2, engine, {})
    assert not writer.settle()
    assert "after step 2 could not be written: [Errno 28]" in capsys.readouterr().err
    writer.storage.limit = 1 << 30
    writer.save(3, engine, {})
    assert saved_steps(run) == [3, 1]


def test_a_file_that_names_no_storage_is_refused(tmp_path: Path):
    (tmp_path / CHECKPOINTS).write_text("nowhere")
    with pytest.raises(UserError, match="holds 'nowhere'; expected name:place, the name one of folder"):
        storage_of(tmp_path)
    (tmp_path / CHECKPOINTS).write_text("s4:bucket/x")
    with pytest.raises(UserError, match="'s4' is none of the known checkpoint_storages: folder"):
        storage_of(tmp_path)


def test_a_place_that_cannot_be_opened_is_named(run: Path):
    (run / CHECKPOINTS).write_text("memory:/unreachable")
    with pytest.raises(
        UserError, match="names memory:/unreachable, which cannot be opened: ConnectionError: nobody answers"
    ):
        storage_of(run)


def test_a_folder_elsewhere_is_a_storage_by_name(tmp_path: Path):
    (tmp_path / CHECKPOINTS).write_text(f"folder:{tmp_path / 'big disk'}\n")
    save(tmp_path, 1, bare_engine())
    assert (tmp_path / "big disk" / "step-000000001" / MANIFEST).is_file()
    assert newest_complete(tmp_path, report=silent) is not None


def test_a_folder_shows_whole_files_alone_and_replaces_as_a_whole(tmp_path: Path):
    folder = Folder(tmp_path)

    def interrupted():
        yield b"new"
        assert [path.read_bytes() for path in (tmp_path / "a").glob("[!.]*")] == [b"old"]
        raise KeyboardInterrupt

    folder.put("a", "x", [b"old"])
    with pytest.raises(KeyboardInterrupt):
        folder.put("a", "x", interrupted())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x"]
    folder.put("a.partial", "x", [b"new"])
    folder.commit("a.partial", "a")
    with folder.read("a", "x") as file:
        assert file.read() == b"new"
    assert folder.list() == ["a"]
    folder.remove("a")
    folder.remove("a")
    assert folder.list() == []


@pytest.mark.parametrize("name", ["step-000000099.reports", "step-000000099.partial", "step-000000099"])
def test_a_removal_that_was_killed_half_way_hinders_no_other_of_that_name_and_is_cleared_away(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    storage = Folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before it
        storage.put(name, "file", [b"1"])
        storage.remove(name)
    assert name not in storage.list()
    (left,) = unfinished(storage)
    storage.put(name, "file", [b"2"])
    storage.remove(name)
    assert storage.list() == []
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        storage.put(name, "file", [b"1"])
        storage.remove(name)
    storage.remove(left)
    assert storage.list() == []
