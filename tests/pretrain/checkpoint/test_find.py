"""Checkpoints without DeepSpeed and in one process: the files, the commit, what is refused, and kills at any moment.

What needs ranks and ZeRO stages is in test_engine.py.
"""

import json
import multiprocessing
import random
import shutil
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from data_pipeline.core.errors import UserError
from pretrain.checkpoint import write as checkpoint_writer
from pretrain.checkpoint.__main__ import main
from pretrain.checkpoint.find import discard_after, newest_complete
from pretrain.checkpoint.read import read_tensors, restore, verify
from pretrain.checkpoint.slices import read_manifest, saved_steps, write_slices
from pretrain.checkpoint.write import CheckpointWriter
from pretrain.engine.optim import STATES, Optimizer, build_optimizer
from pretrain.engine.partition import partition_of
from pretrain.ranks.distributed import Topology
from tests.pretrain.engine_toy import ToyStage
from tests.pretrain.tiny_run import full_disk


def toy_engine(stage: nn.Module | None = None, seed: int = 0) -> SimpleNamespace:
    """What a writer needs of an engine, around a plain module: stage 0's partition has no DeepSpeed in it."""
    stage = stage or ToyStage()
    base = build_optimizer(stage, Optimizer(lr=3e-4))
    names = {p: name for name, p in stage.named_parameters()}
    decays = {names[p]: group["decays"] for group in base.param_groups for p in group["params"]}
    partition = partition_of(names, decays, base, base, rank=0, world_size=1)
    torch.manual_seed(seed)
    for state in STATES:
        for _, view in partition.views(state):
            view.normal_()
    partition.adam_step = seed
    return SimpleNamespace(
        stage=stage, partition=partition, settings=SimpleNamespace(zero_stage=0, precision="fp32"),
        buffers=lambda: {"latents_mean": stage.latents_mean}, aliases=lambda: {},
    )  # fmt: skip


def states_of(engine: SimpleNamespace) -> dict[str, torch.Tensor]:
    return {f"{s}/{held.name}": view.clone() for s in STATES for held, view in engine.partition.views(s)}


def save(run: Path, step: int, engine: SimpleNamespace, **kwargs) -> Path:
    CheckpointWriter(run, Topology(), keep_last=100).save(step, engine, {"note": step}, blocking=True, **kwargs)
    return run / "checkpoints" / f"step-{step:09d}"


def silent(_: str) -> None:
    pass


def test_save_and_restore_are_exact(tmp_path: Path):
    saved, loaded = toy_engine(seed=3), toy_engine(seed=4)
    saved.stage.latents_mean += 1
    path = save(tmp_path, 7, saved, tensors={"statistics": torch.arange(3)})
    manifest = restore(path, loaded)
    assert (manifest.step, manifest.adam_step, manifest.extra) == (7, 3, {"note": 7})
    assert states_of(saved).keys() == states_of(loaded).keys()
    assert all(torch.equal(states_of(saved)[name], tensor) for name, tensor in states_of(loaded).items())
    assert torch.equal(loaded.stage.latents_mean, saved.stage.latents_mean)
    assert loaded.partition.adam_step == 3
    assert torch.equal(read_tensors(tmp_path)["statistics"], torch.arange(3))


def test_tensors_read_without_an_engine_load_into_the_module(tmp_path: Path):
    engine = toy_engine(seed=1)
    save(tmp_path, 1, engine)
    stage = ToyStage()
    stage.load_state_dict(read_tensors(tmp_path, "weight"))
    assert all(torch.equal(p, engine.stage.state_dict()[name]) for name, p in stage.state_dict().items())
    assert not torch.equal(read_tensors(tmp_path, "ema")["scale"], stage.scale)
    with pytest.raises(UserError, match="no state 'momentum'"):
        read_tensors(tmp_path, "momentum")


def test_the_files_are_plain_safetensors_of_minimal_size(tmp_path: Path):
    engine = toy_engine(nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300)))
    engine.buffers = dict
    path = save(tmp_path, 1, engine)
    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(
            file.get_tensor("ema/0.bias@0"), next(v for h, v in engine.partition.views("ema") if h.name == "0.bias")
        )
    minimum = 16 * sum(p.numel() for p in engine.stage.parameters())
    assert sum(file.stat().st_size for file in path.iterdir()) <= 1.02 * minimum


def test_training_may_go_on_while_a_save_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = toy_engine(seed=5)
    before = states_of(engine)
    written = checkpoint_writer.write_slices
    monkeypatch.setattr(checkpoint_writer, "write_slices", lambda *a: (time.sleep(0.3), written(*a))[1])
    writer = CheckpointWriter(tmp_path, Topology())
    writer.save(1, engine, {})
    for state in STATES:
        for _, view in engine.partition.views(state):
            view.zero_()
    writer.close()
    restore(tmp_path / "checkpoints" / "step-000000001", engine)
    assert all(torch.equal(before[name], tensor) for name, tensor in states_of(engine).items())


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path):
    writer, engine = CheckpointWriter(tmp_path, Topology(), keep_last=2, keep_every=4), toy_engine()
    for step in range(1, 10):
        writer.save(step, engine, {})
    writer.close()
    assert [step for step, _ in saved_steps(tmp_path / "checkpoints")] == [9, 8, 4]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000009\n"
    assert not list((tmp_path / "checkpoints").glob("*.*"))


def test_a_failed_save_is_named_at_once_and_the_next_one_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    engine, writer = toy_engine(), CheckpointWriter(tmp_path, Topology())
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
    writer.close()


def test_a_second_failure_is_raised_and_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    engine = toy_engine()
    first = save(tmp_path, 1, engine)
    writer = CheckpointWriter(tmp_path, Topology())
    monkeypatch.setattr(checkpoint_writer, "write_slices", full_disk)
    writer.save(2, engine, {})
    with pytest.raises(RuntimeError, match="No space left"):
        writer.save(3, engine, {})
    assert newest_complete(tmp_path, report=silent) == first
    with pytest.raises(UserError, match="JSON"):
        writer.save(3, engine, {"x": object()})


def test_rank_0_gives_up_on_a_rank_that_does_not_write(tmp_path: Path):
    writer = CheckpointWriter(tmp_path, Topology(rank=0, world_size=2), timeout_s=0.2)
    writer._life = 1
    partial = tmp_path / "checkpoints" / "step-000000001.partial"
    partial.mkdir()
    (partial / "rank-00001.safetensors.json").write_text(json.dumps({"job": "0-1", "bytes": 1, "sha256": ""}))
    writer.save(1, toy_engine(), {})
    with pytest.raises(RuntimeError, match=r"rank-00001.safetensors not written within"):
        writer.close()


def test_rank_0_may_commit_as_soon_as_it_sees_the_last_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace, partial = Path.replace, tmp_path / "checkpoints" / "step-000000001.partial"

    def replace_and_commit(path: Path, target: Path) -> None:
        replace(path, target)
        if target == partial / "rank-00001.safetensors.json":
            partial.rename(partial.with_suffix(""))

    monkeypatch.setattr(Path, "replace", replace_and_commit)
    writer = CheckpointWriter(tmp_path, Topology(rank=1, world_size=2))
    writer.save(1, toy_engine(), {})
    writer.close()
    found = [path.name for path in sorted((tmp_path / "checkpoints").rglob("*"))]
    assert found == ["step-000000001", "rank-00001.safetensors", "rank-00001.safetensors.json"]


def test_the_same_step_can_be_saved_again_after_a_rewind(tmp_path: Path):
    for seed, step in ((1, 5), (2, 6), (3, 5)):
        save(tmp_path, step, toy_engine(seed=seed))
    assert read_manifest(tmp_path / "checkpoints" / "step-000000005").adam_step == 3
    discard_after(tmp_path, 5)
    assert newest_complete(tmp_path, report=silent) == tmp_path / "checkpoints" / "step-000000005"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000005\n"


def test_other_models_are_refused_by_name(tmp_path: Path):
    path = save(tmp_path, 1, toy_engine())
    stage = ToyStage()
    stage.aux = nn.Linear(11, 6)
    with pytest.raises(UserError, match=r"aux.bias of shape \[5\], the model wants \[6\]"):
        restore(path, toy_engine(stage))
    stage.aux = None
    stage.extra = nn.Parameter(torch.ones(2))
    with pytest.raises(UserError, match=r"has aux.bias, which the model does not have.*lacks extra"):
        restore(path, toy_engine(stage))
    stage = ToyStage()
    stage.aux.weight.no_weight_decay = True
    with pytest.raises(UserError, match=r"trained aux\.weight with weight decay, the model wants it without"):
        restore(path, toy_engine(stage))


def mutate(path: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint in one of many ways; returns what was done."""
    victim = path / rng.choice(["manifest.json", "rank-00000.safetensors"])
    content = bytearray(victim.read_bytes())
    position = rng.randrange(len(content))
    kind = rng.choice(["flip", "flip", "flip", "truncate", "append", "delete", "zero", "swap", "empty"])
    if kind == "flip":
        content[position] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[:position]
    elif kind == "append":
        content += b"\0"
    elif kind == "zero":
        content[position:] = bytes(len(content) - position)
    elif kind == "swap":
        content[position], content[position - 1] = content[position - 1] ^ 1, content[position]
    elif kind == "empty":
        content = bytearray()
    if kind == "delete":
        victim.unlink()
    else:
        victim.write_bytes(content)
    return f"{kind} at {position} of {victim.name}"


def test_a_hundred_mutations_are_passed_over_by_name(tmp_path: Path):
    previous = save(tmp_path, 1, toy_engine(seed=1))
    newest = save(tmp_path, 2, toy_engine(seed=2))
    pristine = tmp_path / "pristine"
    shutil.copytree(newest, pristine)
    good = read_manifest(newest)
    rng = random.Random(0)
    for _ in range(100):
        what = mutate(newest, rng)
        reports: list[str] = []
        found = newest_complete(tmp_path, report=reports.append)
        if found == newest:  # the only harmless damage: to the manifest's white space
            assert read_manifest(newest) == good, what
        else:
            assert found == previous, what
            assert len(reports) == 1, what
            assert newest.name in reports[0], what
            with pytest.raises((UserError, OSError)):
                verify(newest)
        shutil.rmtree(newest)
        shutil.copytree(pristine, newest)


def test_nothing_to_resume_from(tmp_path: Path):
    assert newest_complete(tmp_path, report=silent) is None
    with pytest.raises(UserError, match="neither a checkpoint"):
        read_tensors(tmp_path)


def test_missing_ranges_are_noticed(tmp_path: Path):
    path = save(tmp_path, 1, toy_engine())
    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        names = [name for name in file.keys() if name != "ema/scale@0"]  # noqa: SIM118
        tensors = [(name, file.get_tensor(name).clone()) for name in names]
    manifest = read_manifest(path)
    manifest.files["rank-00000.safetensors"] = write_slices(path / "rank-00000.safetensors", tensors)
    manifest.save(path)
    with pytest.raises(UserError, match="incomplete"):
        verify(path)
    with pytest.raises(UserError, match="incomplete"):
        restore(path, toy_engine())


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = save(tmp_path, 3, toy_engine())
    assert main(["inspect", str(tmp_path)]) == 0
    assert "step 3, saved by 1 rank(s), ZeRO-0" in capsys.readouterr().out
    assert main(["verify", str(path)]) == 0
    assert "complete and unaltered" in capsys.readouterr().out
    (path / "rank-00000.safetensors").write_bytes(b"")
    assert main(["verify", str(path)]) == 2
    assert "has 0 bytes" in capsys.readouterr().err


def save_until_killed(run: Path, first: int, returned: Synchronized) -> None:
    """Save a state that consists of its step's number, over and over; note the step of the last save() to return."""
    torch.set_num_threads(1)
    writer, engine = CheckpointWriter(run, Topology(), keep_last=2), toy_engine()
    for step in range(first, first + 100000):
        for _, view in engine.partition.views("weight"):
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
