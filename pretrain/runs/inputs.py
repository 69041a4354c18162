"""What a run reads: the prepared data, and everything frozen. Without torch, so that what is not there is said at once."""

from dataclasses import dataclass

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
    return Inputs(manifest, part(place)(config) if place else {})
