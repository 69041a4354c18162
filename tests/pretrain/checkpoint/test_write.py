"""Saves beside training: the commit, failures, kills at any moment. What needs ranks and ZeRO stages is in engine/test_engine.py."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

import pytest
import torch

from data_pipeline.core import storage as core_storage
from data_pipeline.core.errors import UserError
from pretrain.checkpoint import write as checkpoint_writer
from pretrain.checkpoint.find import newest_complete, saved_steps
from pretrain.checkpoint.read import read_tensors, restore, verify
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.ranks.distributed import Topology
from tests.pretrain.bare_engine import bare_engine, save, silent, states_of
from tests.pretrain.tiny_run import full_disk


def test_training_may_go_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = bare_engine(seed=5)
    before = states_of(engine)
    written = checkpoint_writer.write_slices
    monkeypatch.setattr(checkpoint_writer, "write_slices", lambda *a: (time.sleep(0.3), written(*a))[1])
    writer = CheckpointWriter(tmp_path, Topology())
    writer.save(1, engine, {})
    for _, _, view in engine.partition.views():
        view.zero_()
    writer.wait()
    restore(Checkpoint(storage_of(tmp_path), "step-000000001"), engine)
    assert all(torch.equal(before[name], tensor) for name, tensor in states_of(engine).items())


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path):
    writer, engine = CheckpointWriter(tmp_path, Topology(), keep_last=2, keep_every=4), bare_engine()
    for step in range(1, 10):
        writer.save(step, engine, {})
    writer.wait()
    assert saved_steps(tmp_path) == [9, 8, 4]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000009\n"
    assert not list((tmp_path / "checkpoints").glob("*.*"))


def test_neither_what_was_just_written_nor_what_the_run_came_from_is_deleted(tmp_path: Path):
    for step in (2, 3, 8, 9):
        save(tmp_path, step, bare_engine())
    writer = CheckpointWriter(tmp_path, Topology(), keep_last=1, restored=2)
    for step in (4, 5):
        writer.save(step, bare_engine(), {}, blocking=True)
        assert saved_steps(tmp_path) == [9, 8, step, 2]  # whoever wrote the later ones may need them


def test_only_leavings_of_saves_are_deleted(tmp_path: Path):
    own = [f"step-000000004.{suffix}" for suffix in ("partial", "reports", "replaced", "deleted")]
    others = [
        "step-000000002.bak",
        "step-000000002.good",
        "step-000000004.partial.keep",
        "step-4.partial",
        "best",
        "x.deleted",
    ]
    for name in (*own, *others):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    CheckpointWriter(tmp_path, Topology()).save(6, bare_engine(), {}, blocking=True)
    assert sorted(storage_of(tmp_path).list()) == sorted([*others, "step-000000006"])


def test_a_failed_save_is_named_at_once_and_the_next_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    engine, writer = bare_engine(), CheckpointWriter(tmp_path, Topology())
    writer.save(1, engine, {}, blocking=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_slices", full_disk)
        writer.save(2, engine, {})
        assert not writer.settle()
    assert "the checkpoint after step 2 could not be written: [Errno 28] No space left" in capsys.readouterr().err
    writer.save(3, engine, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-000000001",
        "step-000000003",
    ]
    assert writer.settle()
    writer.wait()


def broken_disk(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_second_failure_is_raised_and_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = bare_engine()
    first = save(tmp_path, 1, engine)
    writer = CheckpointWriter(tmp_path, Topology())
    monkeypatch.setattr(checkpoint_writer, "write_slices", broken_disk)
    writer.save(2, engine, {})
    with pytest.raises(RuntimeError, match="Input/output error"):
        writer.save(3, engine, {})
    assert str(newest_complete(tmp_path, report=silent)) == str(first)
    with pytest.raises(UserError, match="JSON"):
        writer.save(3, engine, {"x": object()})


def test_a_full_disk_costs_saves_but_never_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    engine, writer = bare_engine(), CheckpointWriter(tmp_path, Topology())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer, "write_slices", full_disk)
        for step in (1, 2, 3):
            writer.save(step, engine, {})
        assert not writer.settle()
        assert capsys.readouterr().err.count("[Errno 28] No space left") == 3
        with pytest.raises(RuntimeError, match="No space left"):
            writer.save(4, engine, {}, blocking=True)  # the last one, or one for a signal
    writer.save(5, engine, {}, blocking=True)
    assert saved_steps(tmp_path) == [5]


def test_rank_0_gives_up_on_a_rank_that_does_not_write(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, Topology(rank=0, world_size=2), timeout_s=0.2)
    writer._life = 1
    of_an_earlier_life = json.dumps({"job": "0-1", "bytes": 1, "sha256": ""})
    writer.storage.put("step-000000001.reports", "rank-00001.safetensors", [of_an_earlier_life.encode()])
    writer.save(1, bare_engine(), {})
    with pytest.raises(RuntimeError, match=r"rank-00001.safetensors not written within"):
        writer.wait()


def test_rank_0_may_commit_as_soon_as_it_sees_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace, folder = core_storage.os.replace, tmp_path / "checkpoints"

    def replace_and_commit(path: str, target: Path) -> None:
        replace(path, target)
        if target.parent == folder / "step-000000001.reports":
            (folder / "step-000000001.partial").rename(folder / "step-000000001")
            shutil.rmtree(target.parent)

    monkeypatch.setattr(core_storage.os, "replace", replace_and_commit)
    writer = CheckpointWriter(tmp_path, Topology(rank=1, world_size=2))
    writer.save(1, bare_engine(), {})
    writer.wait()
    found = [path.name for path in sorted((tmp_path / "checkpoints").rglob("*"))]
    assert found == ["step-000000001", "rank-00001.safetensors"]


def save_until_killed(run: Path, first: int, returned: Synchronized) -> None:
    """Save a state that consists of its step's number, over and over; note the step of the last save() to return."""
    torch.set_num_threads(1)
    writer, engine = CheckpointWriter(run, Topology(), keep_last=2), bare_engine()
    for step in range(first, first + 100000):
        for _, _, view in engine.partition.views():
            view.fill_(step)
        writer.save(step, engine, {})
        returned.value = step


def test_kill_9_at_random_moments_always_leaves_a_usable_checkpoint(tmp_path: Path):
    rng, forks, step = random.Random(0), multiprocessing.get_context("fork"), 0
    for _ in range(20):
        returned, first = forks.Value("q", 0), step + 1
        process = forks.Process(target=save_until_killed, args=(tmp_path, first, returned))
        process.start()
        while returned.value <= first:
            time.sleep(0.001)
        time.sleep(rng.uniform(0.0, 0.05))
        process.kill()
        process.join()
        path = newest_complete(tmp_path, report=silent)
        assert path is not None
        step = verify(path).step
        assert step >= returned.value - 1, "save n returned, so save n - 1 was complete"
        assert all((tensor == step).all() for tensor in read_tensors(path, "weight", buffers=False).values())
