"""The run whose weights a new run starts from (`train.init_from`)."""

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.storage import Checkpoint
from pretrain.config.schema import RunConfig
from pretrain.runs.inputs import find_inputs
from pretrain.runs.record import RunRecord

KEY = "train.init_from"


def earlier_checkpoint(config: RunConfig, manifest: Manifest) -> Checkpoint:
    """The checkpoint that `train.init_from` names. Raises: UserError, if it is of another stage, tokenizer or VAE."""
    source = config.train.init_from
    checkpoint = checkpoint_of(source, f"--set {KEY}=")
    record = RunRecord.of_checkpoint(read_manifest(checkpoint))
    if record.stage != config.stage:
        raise UserError(f"{KEY} {source} is a run of stage {record.stage}; expected one of stage {config.stage}")
    if record.tokenizer_sha256 != manifest.tokenizer.sha256:
        raise UserError(
            f"{KEY} {source} was trained with tokenizer {record.tokenizer_sha256[:16]}, the data has {manifest.tokenizer.sha256[:16]}"
            f" ({manifest.tokenizer.name}): prepare the text with the tokenizer of that run's data"
        )
    vae = "model.vae"
    before, now = record.inputs.get(vae), find_inputs(config).fingerprints.get(vae)
    if before != now:
        raise UserError(
            f"{KEY} {source} was trained on the latents of a VAE of fingerprint {str(before)[:16]}, {vae} has {str(now)[:16]}:"
            f" set {vae} to the VAE of that run"
        )
    return checkpoint
