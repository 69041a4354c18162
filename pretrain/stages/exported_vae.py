"""A VAE that was exported (`textldm convert` of a stage-1 run): a folder, or one of the hub. Without torch, like inputs.py."""

import hashlib
import json
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError, reason
from data_pipeline.core.hub import use_hub
from data_pipeline.core.outside import parse_json, read_at_most

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODEL_TYPE = "textvae"
HUB = "hf://"


def exported_vae(name: str | Path, named_by: str) -> Path | None:
    """The local folder of an exported VAE, which hf://owner/name is fetched for; None for what is no export, e.g. a run.

    Raises: UserError for an export of something else, or a hub id that cannot be fetched.
    """
    folder = _fetched(str(name), named_by) if str(name).startswith(HUB) else Path(name)
    try:
        kind = export_config(folder).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind is None and folder == Path(name):
        return None
    if kind != MODEL_TYPE or not (folder / WEIGHTS).is_file():
        what = f"a model of type {kind}" if kind != MODEL_TYPE else f"no {WEIGHTS}"
        raise UserError(
            f"{named_by}{name} holds {what}; expected the export of a stage-1 run (textldm convert), or the run itself"
        )
    return folder


def export_config(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder. Raises: OSError, ValueError."""
    with (folder / CONFIG).open("rb") as file:
        return parse_json(read_at_most(file))


def export_fingerprint(folder: Path) -> str:
    """Hash of its weights and shape."""
    with (folder / WEIGHTS).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    shape = json.dumps(export_config(folder).get("vae"), sort_keys=True)
    return hashlib.sha256(f"{weights} {shape}".encode()).hexdigest()


def _fetched(name: str, named_by: str) -> Path:
    from huggingface_hub import snapshot_download

    use_hub()
    try:
        return Path(snapshot_download(name.removeprefix(HUB), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of many kinds: no such repository, no network, no right to it
        raise UserError(f"{named_by}{name} cannot be fetched from the hub ({reason(error)})") from None
