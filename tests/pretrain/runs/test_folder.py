"""A run's folder holds no password, and what it says deletes nothing (docs/security.md: attacks 1b, 10a)."""

import json
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.config.load import load_config
from pretrain.config.resume import resume_differences
from pretrain.runs.folder import config_of, write_config
from pretrain.runs.record import RunRecord
from pretrain.session import find_inputs
from pretrain.telemetry import sinks
from tests.pretrain import tiny_run

URL, SHOWN = "https://me:pass@host/x", "https://***@host/x"


def config_with(folder: Path, *overrides: str):
    values = tiny_run.config_values(folder / "data", folder / "run")
    return load_config(tiny_run.write_config(folder / "c.json", values), overrides)


def test_attack_1b_a_runs_own_configuration_names_no_folder_to_delete_from(tmp_path: Path) -> None:
    config = config_with(tmp_path, 'data.cache_dir="/home/me/photos"')
    (tmp_path / "run").mkdir()
    write_config(config)
    assert "/home/me/photos" in (tmp_path / "run" / "config.json").read_text()
    assert config_of(tmp_path / "run").data.cache_dir is None
    assert config_of(tmp_path / "run", ["data.cache_dir=mine"]).data.cache_dir == "mine"
    record = RunRecord.of_run(config, Manifest.load(tiny_run.write_data(tmp_path / "data")))
    assert record.run_config("x").data.cache_dir is None


def test_attack_10a_no_file_and_no_recorder_gets_a_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.load(tiny_run.write_data(tmp_path / "data"))
    config = config_with(tmp_path, f"data.path={URL}")
    (tmp_path / "run").mkdir()
    write_config(config)
    record = RunRecord.of_run(config, manifest)
    given = {}

    class Wandb:
        Settings = staticmethod(lambda **_: None)

        @staticmethod
        def init(**options):
            given.update(options)
            return Wandb

        define_metric = staticmethod(lambda *_, **__: None)
        log = finish = None

    monkeypatch.setattr(sinks, "wandb_mode", lambda: "offline")
    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    sinks.start_wandb(tmp_path / "run", config)
    written = sinks.Sinks(tmp_path / "run", config, 0)
    written.say(f"over 3 passes over {URL} \x1b[2J")
    written.write({"kind": "event", "what": URL})
    written.close()
    files = {path.name: path.read_text() for path in (tmp_path / "run").iterdir() if path.is_file()}
    assert files.keys() >= {"config.json", "log.txt", "metrics.jsonl"}
    for text in (*files.values(), json.dumps(record.extra()), json.dumps(given["config"])):
        assert "pass@" not in text
        assert "\x1b" not in text
    for text in (
        files["config.json"],
        files["log.txt"],
        files["metrics.jsonl"],
        json.dumps(record.extra()),
        json.dumps(given["config"]),
    ):
        assert SHOWN in text
    assert config.data.path == URL  # what is read stays what it was
    assert not resume_differences(record.config, config)


def test_attack_20_data_may_be_pinned(tmp_path: Path) -> None:
    found = Manifest.load(tiny_run.write_data(tmp_path / "data")).fingerprint
    for pinned in (found, found[:8]):
        assert find_inputs(config_with(tmp_path, f"data.fingerprint={json.dumps(pinned)}"))
    other = ("0" if found[0] != "0" else "1") + found[1:16]
    with pytest.raises(UserError, match=f"has fingerprint {found}, data.fingerprint says {other}"):
        find_inputs(config_with(tmp_path, f"data.fingerprint={json.dumps(other)}"))
    with pytest.raises(UserError, match=r"data\.fingerprint says"):  # whoever reads a run's data, the diagnosis too
        config_with(tmp_path, f"data.fingerprint={json.dumps(other)}").data.manifest()
    with pytest.raises(UserError, match=r"data\.fingerprint"):
        config_with(tmp_path, 'data.fingerprint="x"')
