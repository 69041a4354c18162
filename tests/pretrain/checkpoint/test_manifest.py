"""What a manifest from elsewhere may say (docs/security.md: attacks 7a, 7d)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.errors import UserError
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors, verify
from tests.pretrain.checkpoint.forged import FILE, forge


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["files"] = {name: content["files"][FILE]}

    return change


@pytest.mark.parametrize(
    "name", ["../x/rank-00000.safetensors", "/etc/passwd", "x", "rank-0.safetensors", f"{FILE}\n", ""]
)
def test_attack_7a_a_file_outside_of_the_checkpoint_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    checkpoint = forge(tmp_path / "step", {"weight/w@0": torch.ones(4)}, renamed(name))
    for use in (read_manifest, verify, lambda found: read_tensors(found, "weight")):
        with pytest.raises(UserError, match=r"step/manifest\.json is not what training writes: files"):
            use(checkpoint)


WHOLE = {"begin": 0, "bytes": 1, "sha256": "0" * 64}

BROKEN: list[tuple[str, Any]] = [
    ("files", {FILE: {"header": WHOLE | {"bytes": -1}, "states": {}}}),
    ("files", {FILE: {"header": WHOLE | {"begin": -1}, "states": {}}}),
    ("files", {FILE: {"header": WHOLE, "states": {"ema": WHOLE | {"sha256": "0"}}}}),
    ("files", {FILE: {"header": WHOLE, "states": {"ema": WHOLE | {"bytes": True}}}}),
    ("files", {FILE: {"header": WHOLE, "states": [WHOLE]}}),
    ("files", {FILE: WHOLE}),
    ("files", [FILE]),
    ("files", None),
    ("parameters", {"w": {"shape": [-4], "decays": True, "states": ["weight"]}}),
    ("parameters", {"w": {"shape": [1 << 60], "decays": True, "states": ["weight"]}}),
    ("parameters", {"w": {"shape": [2] * 9, "decays": True, "states": ["weight"]}}),
    ("parameters", {"w": {"shape": "4", "decays": True, "states": ["weight"]}}),
    ("parameters", {"w": []}),
    ("parameters", 1),
    ("step", "1"),
    ("aliases", {"v": 1}),
    ("extra", []),
    ("more", 1),
]


@pytest.mark.parametrize(("key", "value"), BROKEN)
def test_attack_7d_broken_manifests_are_one_line(tmp_path: Path, key: str, value: Any) -> None:
    checkpoint = forge(tmp_path / "step", {"weight/w@0": torch.ones(4)}, lambda content: content.update({key: value}))
    with pytest.raises(UserError, match=rf"step/manifest\.json is not what training writes: {key}"):
        verify(checkpoint)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[" * 200 + "]" * 200, "1" * 5000, "", "null", "[]", '"x"']
)
def test_attack_7d_what_is_no_manifest_is_named(tmp_path: Path, text: str) -> None:
    checkpoint = forge(tmp_path / "step", {"weight/w@0": torch.ones(4)})
    checkpoint.storage.put(checkpoint.name, "manifest.json", [text.encode()])
    with pytest.raises(UserError, match=r"step/manifest\.json"):
        read_manifest(checkpoint)


def test_attack_7d_a_manifest_without_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.core.outside.read_at_most.__defaults__", (1000,))
    checkpoint = forge(
        tmp_path / "step", {"weight/w@0": torch.ones(4)}, lambda content: content["extra"].update(a="x" * 900)
    )
    assert json.loads((tmp_path / "step" / "manifest.json").read_text())
    with pytest.raises(UserError, match="more than the 1,000 bytes"):
        read_manifest(checkpoint)
