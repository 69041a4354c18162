"""The weights that a new run starts from (`train.init_from`, `distill.teacher`): of another run, or of an export, here or on the hub."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from data_pipeline.core.errors import UserError, reason
from data_pipeline.core.outside import read_at_most
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.tokenization import TOKENIZER_FILES, tokenizer_hash
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import SavedTensors
from pretrain.checkpoint.storage import Checkpoint
from pretrain.checkpoint.tensor_files import UNREADABLE, TensorFiles
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig
from pretrain.runs.inputs import find_inputs
from pretrain.runs.record import RunRecord
from pretrain.stages.exported import STAGE, export_config, exported_folder, weight_files


@contextmanager
def earlier_weights(config: RunConfig, manifest: Manifest) -> Iterator[tuple[Mapping[str, Tensor], Checkpoint | Path]]:
    """The tensors that `RunConfig.first_weights` names, by the stage's names, and where they are from: EMA weights of a run, or what an
    export holds, which lacks what only training has. Within, they are read one by one when they are asked for.

    Raises: UserError, if they are of another stage, tokenizer or VAE, or cannot be read.
    """
    assert config.first_weights is not None
    key, source = config.first_weights
    folder = exported_folder(source, f"--set {key}=")
    with ExitStack() as stack:
        if folder is None:
            checkpoint = earlier_checkpoint(config, manifest)
            yield stack.enter_context(SavedTensors(read_manifest(checkpoint), "ema")), checkpoint
        else:
            yield _of_export(config, manifest, folder, stack), folder


def _of_export(config: RunConfig, manifest: Manifest, folder: Path, stack: ExitStack) -> Mapping[str, Tensor]:
    assert config.first_weights is not None
    key, source = config.first_weights
    try:
        export = export_config(folder)
        stage = export.get(STAGE)
        if stage is None:
            raise UserError(
                f"{key} {source} is a model of type {export.get('model_type')}; expected a run or an export (textldm convert) of stage"
                f" {' or '.join(config.earlier_stages)}"
            )
        _check_stage(config, stage, f"{key} {source} is the export of a run")
        own = stage_kind(stage).load("from_export")
        if own is None:
            raise UserError(
                f"{key} {source} is an export of stage {stage}, whose StageKind names no from_export: start from its run"
            )
        _check_tokenizer(f"{key} {source}", _tokenizer_of(folder), manifest)
        found: Mapping[str, Tensor] = own(config, export, stack.enter_context(TensorFiles(weight_files(folder))))
        return found
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(
            f"{key} {source} is not what textldm convert writes ({reason(error)}): export it again"
        ) from None


def _check_stage(config: RunConfig, stage: str, what: str) -> None:
    if stage not in config.earlier_stages:
        raise UserError(
            f"{what} of stage {stage}; expected a run or an export (textldm convert) of stage {' or '.join(config.earlier_stages)}"
        )


def _tokenizer_of(folder: Path) -> str:
    with (folder / TOKENIZER_FILES[0]).open("rb") as file:
        return tokenizer_hash(read_at_most(file))


def _check_tokenizer(what: str, found: str, manifest: Manifest) -> None:
    if found != manifest.tokenizer.sha256:
        raise UserError(
            f"{what} was trained with tokenizer {found[:16]}, the data has {manifest.tokenizer.sha256[:16]}"
            f" ({manifest.tokenizer.name}): prepare the text with the tokenizer of that run's data"
        )


def earlier_checkpoint(config: RunConfig, manifest: Manifest) -> Checkpoint:
    """The checkpoint that `RunConfig.first_weights` names. Raises: UserError, if it is of another stage, tokenizer or VAE."""
    assert config.first_weights is not None
    key, source = config.first_weights
    checkpoint = checkpoint_of(source, f"--set {key}=")
    record = RunRecord.of_checkpoint(read_manifest(checkpoint))
    _check_stage(config, record.stage, f"{key} {source} is a run")
    _check_tokenizer(f"{key} {source}", record.tokenizer_sha256, manifest)
    vae = "model.vae"
    before, now = record.inputs.get(vae), find_inputs(config).fingerprints.get(vae)
    if before != now:
        raise UserError(
            f"{key} {source} was trained on the latents of a VAE of fingerprint {str(before)[:16]}, {vae} has {str(now)[:16]}:"
            f" set {vae} to the VAE of that run"
        )
    return checkpoint
