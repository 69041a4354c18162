"""What a run reads: the prepared data, and everything frozen. Without torch, so that what is not there is said at once."""

from dataclasses import dataclass

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.config.registry import part, stage_kind
from pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the prepared data, and the fingerprints of all that is frozen, by the key that names it."""

    manifest: Manifest
    fingerprints: dict[str, str]


def find_inputs(config: RunConfig) -> Inputs:
    """What the run would read. Raises: UserError for what is not there."""
    manifest, place = config.data.manifest(), stage_kind(config.stage).inputs
    if config.data.fingerprint and not manifest.fingerprint.startswith(config.data.fingerprint):
        raise UserError(
            f"{config.data.path} has fingerprint {manifest.fingerprint}, data.fingerprint says {config.data.fingerprint}: name the"
            " right folder, or drop the key"
        )
    return Inputs(manifest, part(place)(config) if place else {})
