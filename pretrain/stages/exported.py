"""Folders that `textldm convert` wrote, here or on the hub, as what a run starts from or is trained on. Without torch, like inputs.py."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError, reason
from data_pipeline.core.hub import use_hub
from data_pipeline.core.outside import parse_json, read_at_most

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = r"model-\d{5}-of-\d{5}\.safetensors"
MODEL_TYPE = "textvae"
STAGE = "textldm_stage"
"""In the config of an export: the stage of its run."""
HUB = "hf://"


def exported_folder(name: str | Path, named_by: str) -> Path | None:
    """The local folder of an export, which hf://owner/name is fetched for; None for what is no folder with a model's config, e.g. a run.

    Raises: UserError for a hub id that cannot be fetched, and for a config that cannot be read in what was fetched.
    """
    folder = _fetched(str(name), named_by) if str(name).startswith(HUB) else Path(name)
    try:
        kind = export_config(folder).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind is None and folder == Path(name):
        return None
    return folder


def exported_vae(name: str | Path, named_by: str) -> Path | None:
    """The local folder of an exported VAE; None for what is no export. Raises: UserError, also for an export of something else."""
    folder = exported_folder(name, named_by)
    if folder is None:
        return None
    try:
        kind = export_config(folder).get("model_type")
        weight_files(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{named_by}{name} is not what textldm convert writes ({reason(error)}): export it again"
        ) from None
    if kind != MODEL_TYPE:
        raise UserError(
            f"{named_by}{name} holds a model of type {kind}; expected the export of a stage-1 run (textldm convert), or the run itself"
        )
    return folder


def export_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder. Raises: OSError, ValueError."""
    return _json(folder / CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an exported folder: one, or those that its index names. Raises: OSError, ValueError."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise ValueError(f"it holds no {WEIGHTS}")
        return [folder / WEIGHTS]
    places = _json(folder / INDEX).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) else set()
    strange = [name for name in names if not isinstance(name, str) or not re.fullmatch(SHARD, name)]
    if strange or not names:
        raise ValueError(f"{INDEX} names {strange[:1]!r:.60}; expected files like model-00001-of-00002.safetensors")
    return [folder / name for name in sorted(names)]


def export_fingerprint(folder: Path) -> str:
    """Hash of an export's weights and of its VAE's shape. Raises: OSError, ValueError."""
    found = []
    for path in weight_files(folder):
        with path.open("rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    shape = json.dumps(export_config(folder).get("vae"), sort_keys=True)
    return hashlib.sha256(f"{' '.join(found)} {shape}".encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return parse_json(read_at_most(file))


def _fetched(name: str, named_by: str) -> Path:
    from huggingface_hub import snapshot_download

    use_hub()
    try:
        found = snapshot_download(
            name.removeprefix(HUB), allow_patterns=[CONFIG, WEIGHTS, INDEX, "model-*.safetensors", "tokenizer.json"]
        )
        return Path(found)
    except Exception as error:  # of many kinds: no such repository, no network, no right to it
        raise UserError(f"{named_by}{name} cannot be fetched from the hub ({reason(error)})") from None
