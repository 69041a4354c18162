"""What a downloaded run names is read only if it is what the run was made from (docs/security.md: attack 1c)."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.core import storage
from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint import find, manifest
from pretrain.checkpoint.storage import CHECKPOINTS, storage_of
from pretrain.config.load import load_config
from pretrain.runs.folder import CONFIG_NAME, config_of
from pretrain.runs.record import RunRecord
from pretrain.stages.recorded import check_recorded
from tests.pretrain import tiny_run
from tests.pretrain.checkpoint.forged import forge


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """Whoever waits for a pipe's writer fails instead of waiting."""

    def give_up(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, RunRecord]:
    """A run's folder with its data beside it, and what its checkpoint recorded."""
    data = tiny_run.write_data(tmp_path / "data")
    values = tiny_run.config_values(data, tmp_path / "run")
    (tmp_path / "run").mkdir()
    tiny_run.write_config(tmp_path / "run" / CONFIG_NAME, values)
    return tmp_path / "run", RunRecord.of_run(config_of(tmp_path / "run"), Manifest.load(data))


def zeros(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").symlink_to("/dev/zero")


def pipe(place: Path) -> None:
    place.mkdir()
    os.mkfifo(place / "manifest.json")


def huge(place: Path) -> None:
    place.mkdir()
    with open(place / "manifest.json", "wb") as file:
        file.truncate(1 << 40)


def others(place: Path) -> None:
    tiny_run.write_data(place, seed=7)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "/dev/zero": (zeros, "cannot be read"),
    "a pipe": (pipe, "cannot be read"),
    "a file without end": (huge, "more than the 268,435,456 bytes"),
    "a folder": (Path.mkdir, "no finished folder"),
    "other data": (others, r"data\.path of the run's configuration is .*whose fingerprint is .*--set data\.path="),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_attack_1c_data_that_a_run_names_is_its_own(own: tuple[Path, RunRecord], tmp_path: Path, kind: str) -> None:
    run, record = own
    check_recorded(config_of(run), record)
    make, said = HOSTILE[kind]
    make(tmp_path / "elsewhere")
    config = config_of(run)
    config.data.path = str(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=said):
        check_recorded(config, record)
    check_recorded(config, record, {"data.path"})  # the user's own words


@pytest.mark.parametrize("url", ["http://10.0.0.1/x", "https://127.0.0.1:1/x", "file:///etc", "s3://a/b"])
def test_attack_1c_what_a_run_names_is_not_fetched(
    own: tuple[Path, RunRecord], monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    run, record = own
    config = config_of(run)
    config.data.path = url
    monkeypatch.setattr(storage, "_open_url", lambda place: pytest.fail(f"{place} is asked"))
    with pytest.raises(UserError, match=r"what a run names is not fetched: .*--set data\.path="):
        check_recorded(config, record)


def test_attack_1c_of_a_vae_that_a_run_names_no_more_than_the_manifest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    values = tiny_run.config_values(data, tmp_path / "dit") | {"stage": "dit"}
    del values["repa"]
    values["data"]["split"] = {"kind": "context", "min_tokens": 2}
    vae = tmp_path / "vae" / CHECKPOINTS / "step-000000001"
    values["model"] = {"vae": str(tmp_path / "vae"), "latent_dim": 4, "width": 32, "num_layers": 1, "head_dim": 16}
    config = load_config(tiny_run.write_config(tmp_path / "c.json", values))
    found = manifest.read_manifest(forge(vae, {"weight/w@0": torch.ones(4)})).fingerprint
    for module in (find, manifest):
        monkeypatch.setattr(module, "check_hashes", lambda *_: pytest.fail("its files are read"))
    inputs = {"model.vae": found}
    check_recorded(config, RunRecord.of_run(config, Manifest.load(data), inputs=inputs))
    inputs = {"model.vae": "0" * 64}
    record = RunRecord.of_run(config, Manifest.load(data), inputs=inputs)
    for place in (tmp_path / "vae", vae):
        config.model.vae = str(place)
        with pytest.raises(UserError, match=r"model\.vae of the run's configuration is .*whose fingerprint"):
            check_recorded(config, record)
    check_recorded(config, record, {"model.vae"})
    for hostile in (zeros, pipe):
        shutil.rmtree(vae)
        hostile(vae)
        config.model.vae = str(tmp_path / "vae")
        check_recorded(config, record)  # there is none: who loads it says so
        with pytest.raises(UserError, match="nor a run with a complete checkpoint"):
            find.checkpoint_of(config.model.vae)


def test_attack_1c_the_configuration_of_a_run_is_whole_and_has_an_end(own: tuple[Path, RunRecord]) -> None:
    run, _ = own
    (run / CONFIG_NAME).write_text('{"base": "/etc/passwd.json"}')
    with pytest.raises(UserError, match="has a 'base', which a run's own configuration never has"):
        config_of(run)
    with open(run / CONFIG_NAME, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match=r"cannot read .*more than the 268,435,456 bytes"):
        config_of(run)


def test_attack_1c_the_file_that_names_a_storage_has_an_end(tmp_path: Path) -> None:
    with open(tmp_path / CHECKPOINTS, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="names no place"):
        storage_of(tmp_path)
