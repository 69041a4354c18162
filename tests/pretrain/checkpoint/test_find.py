"""Which checkpoint is taken: the newest that nothing has happened to."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.find import (
    checkpoint_at,
    checkpoint_of,
    complete_steps,
    discard_after,
    had_checkpoints,
    newest_complete,
    put_aside_after,
    saved_steps,
    unaltered,
)
from pretrain.checkpoint.manifest import BUFFER, read_manifest
from pretrain.checkpoint.read import read_tensors, verify
from pretrain.checkpoint.storage import Checkpoint, Folder
from pretrain.ranks.distributed import Topology
from tests.pretrain.bare_engine import bare_engine, save, silent


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
    previous, newest = save(tmp_path, 1, bare_engine(seed=1)), save(tmp_path, 2, bare_engine(seed=2))
    folder, pristine = Path(str(newest)), tmp_path / "pristine"
    shutil.copytree(folder, pristine)
    good = read_manifest(newest)
    rng = random.Random(0)
    for _ in range(100):
        what = mutate(folder, rng)
        reports: list[str] = []
        found = newest_complete(tmp_path, report=reports.append)
        if str(found) == str(newest):  # the only harmless damage: to the manifest's white space
            assert "manifest.json" in what
            assert read_manifest(newest) == good, what
        else:
            assert str(found) == str(previous), what
            assert len(reports) == 1, what
            assert newest.name in reports[0], what
            with pytest.raises((UserError, OSError)):
                verify(newest)
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)


def test_nothing_to_resume_from(tmp_path: Path):
    assert newest_complete(tmp_path, report=silent) is None
    assert not had_checkpoints(tmp_path)
    with pytest.raises(UserError, match="neither a checkpoint"):
        read_tensors(tmp_path)


def test_a_damaged_checkpoint_counts_as_one_that_there_was(tmp_path: Path):
    (tmp_path / "checkpoints" / "step-000000004").mkdir(parents=True)
    assert had_checkpoints(tmp_path)


def test_what_was_passed_over_is_put_aside_and_never_twice_under_the_same_name(tmp_path: Path):
    for life in (1, 2):
        for step in (2, 4, 6):
            save(tmp_path, step, bare_engine(seed=10 * life + step))
        put_aside_after(tmp_path, 2, Topology())
        assert saved_steps(tmp_path) == [2]
        assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000002\n"
    aside = {path.name: read_manifest(Checkpoint(Folder(path.parent), path.name)).updates
             for path in (tmp_path / "checkpoints").glob("*.damaged-*")}  # fmt: skip
    assert aside == {
        "step-000000004.damaged-1": 14, "step-000000006.damaged-1": 16,
        "step-000000004.damaged-2": 24, "step-000000006.damaged-2": 26,
    }  # fmt: skip


def test_complete_are_those_whose_files_are_there_in_their_sizes(tmp_path: Path):
    for step in (2, 4, 6):
        save(tmp_path, step, bare_engine(seed=step))
    (tmp_path / "checkpoints" / "step-000000004" / "manifest.json").unlink()
    damaged = tmp_path / "checkpoints" / "step-000000006" / "rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert complete_steps(tmp_path) == {2: read_manifest(checkpoint_at(tmp_path, 2)).fingerprint}


@pytest.mark.parametrize("damaged", ["header", "weight", "exp_avg", "exp_avg_sq", "ema", BUFFER])
def test_who_reads_one_state_needs_that_one_unaltered_and_who_goes_on_needs_all(tmp_path: Path, damaged: str):
    for step in (1, 2):
        save(tmp_path, step, bare_engine(seed=step))
    file, newest = "rank-00000.safetensors", checkpoint_at(tmp_path, 2)
    saved = read_manifest(newest).files[file]
    part = saved.header if damaged == "header" else saved.states[damaged]
    path = Path(f"{newest}/{file}")
    content = bytearray(path.read_bytes())
    content[part.begin + part.bytes // 2] ^= 1
    path.write_bytes(content)
    goes_on = newest_complete(tmp_path, report=silent)
    assert goes_on is not None
    assert goes_on.name == "step-000000001"
    with pytest.raises(UserError, match=f"{file} was altered"):
        unaltered(newest)
    for state in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        needed = damaged in ("header", BUFFER, state)
        assert checkpoint_of(tmp_path, state=state).name == ("step-000000001" if needed else newest.name)


def test_the_parts_of_a_file_share_out_its_bytes_and_hold_what_they_say(tmp_path: Path):
    checkpoint = save(tmp_path, 1, bare_engine(seed=1))
    (file,) = read_manifest(checkpoint).files.items()
    content, end = Path(f"{checkpoint}/{file[0]}").read_bytes(), 0
    for part in sorted(file[1].parts(None), key=lambda part: part.begin):
        assert part.begin == end
        end += part.bytes
        assert hashlib.sha256(content[part.begin : end]).hexdigest() == part.sha256
    assert end == len(content) == file[1].bytes
    with safe_open(f"{checkpoint}/{file[0]}", "np") as opened:  # its library reads it, and finds each state in its part
        for name in opened.keys():  # noqa: SIM118
            state, values = name.partition("/")[0], opened.get_tensor(name).tobytes()
            part = file[1].states[state]
            assert values in content[part.begin : part.begin + part.bytes]
    assert set(file[1].states) == {"weight", "exp_avg", "exp_avg_sq", "ema", BUFFER}


def test_attack_7e_a_checkpoint_that_is_named_is_hashed_before_it_is_used(tmp_path: Path):
    """As large as before and with a right header, but with another weight in it."""
    named = Path(str(save(tmp_path, 1, bare_engine(seed=1))))
    assert checkpoint_of(named).name == named.name
    content = bytearray((named / "rank-00000.safetensors").read_bytes())
    content[-1] ^= 1
    (named / "rank-00000.safetensors").write_bytes(content)
    for use in (checkpoint_of, read_tensors):
        with pytest.raises(UserError, match="was altered: its SHA-256"):
            use(named)
    with pytest.raises(UserError, match="was altered: its SHA-256"):
        unaltered(checkpoint_at(tmp_path, 1))


def test_the_same_step_can_be_saved_again_after_a_rewind(tmp_path: Path):
    for seed, step in ((1, 5), (2, 6), (3, 5)):
        save(tmp_path, step, bare_engine(seed=seed))
    assert read_manifest(checkpoint_at(tmp_path, 5)).updates == 3
    discard_after(tmp_path, 5)
    assert str(newest_complete(tmp_path, report=silent)) == str(checkpoint_at(tmp_path, 5))
    with pytest.raises(UserError, match="no checkpoint of step 6; it has 5"):
        checkpoint_at(tmp_path, 6)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000000005\n"
