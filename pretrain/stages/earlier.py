"""The weights that a new run starts from (`train.init_from`): of another run, or of an exported folder, here or on the hub."""

from pathlib import Path
from typing import Any

from torch import Tensor

from data_pipeline.core.errors import UserError, reason
from data_pipeline.core.outside import read_at_most
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import TOKENIZER_FILES, tokenizer_hash
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import UNREADABLE, TensorFiles
from pretrain.config.registry import part, stage_kind
from pretrain.config.schema import RunConfig
from pretrain.runs.inputs import find_inputs
from pretrain.runs.record import RunRecord
from pretrain.stages.exported import STAGE, export_config, exported_folder, weight_files

KEY = "train.init_from"


def earlier_weights(config: RunConfig, manifest: Manifest) -> tuple[dict[str, Tensor], Checkpoint | Path]:
    """The tensors by the stage's names, and where they are from: EMA weights of a run, or what an export holds, which lacks what only
    training has. Raises: UserError, if they are of another stage, tokenizer or VAE, or cannot be read.
    """
    source = config.train.init_from
    folder = exported_folder(source, f"--set {KEY}=")
    if folder is None:
        checkpoint = earlier_checkpoint(config, manifest)
        return read_tensors(checkpoint, "ema"), checkpoint
    try:
        export = export_config(folder)
        stage, own = export.get(STAGE), stage_kind(config.stage).from_export
        if stage != config.stage or own is None:
            what = f"the export of a run of stage {stage}" if stage else f"a model of type {export.get('model_type')}"
            raise UserError(
                f"{KEY} {source} is {what}; expected a run or an export (textldm convert) of stage {config.stage}"
            )
        _check_tokenizer(source, _tokenizer_of(folder), manifest)
        with TensorFiles(weight_files(folder)) as files:
            found: dict[str, Tensor] = part(own)(config, export, files)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{KEY} {source} is not what textldm convert writes ({reason(error)}): export it again"
        ) from None
    return {name: tensor.float() for name, tensor in found.items()}, folder


def _tokenizer_of(folder: Path) -> str:
    with (folder / TOKENIZER_FILES[0]).open("rb") as file:
        return tokenizer_hash(read_at_most(file))


def _check_tokenizer(source: Any, found: str, manifest: Manifest) -> None:
    if found != manifest.tokenizer.sha256:
        raise UserError(
            f"{KEY} {source} was trained with tokenizer {found[:16]}, the data has {manifest.tokenizer.sha256[:16]}"
            f" ({manifest.tokenizer.name}): prepare the text with the tokenizer of that run's data"
        )


def earlier_checkpoint(config: RunConfig, manifest: Manifest) -> Checkpoint:
    """The checkpoint that `train.init_from` names. Raises: UserError, if it is of another stage, tokenizer or VAE."""
    source = config.train.init_from
    checkpoint = checkpoint_of(source, f"--set {KEY}=")
    record = RunRecord.of_checkpoint(read_manifest(checkpoint))
    if record.stage != config.stage:
        raise UserError(f"{KEY} {source} is a run of stage {record.stage}; expected one of stage {config.stage}")
    _check_tokenizer(source, record.tokenizer_sha256, manifest)
    vae = "model.vae"
    before, now = record.inputs.get(vae), find_inputs(config).fingerprints.get(vae)
    if before != now:
        raise UserError(
            f"{KEY} {source} was trained on the latents of a VAE of fingerprint {str(before)[:16]}, {vae} has {str(now)[:16]}:"
            f" set {vae} to the VAE of that run"
        )
    return checkpoint
