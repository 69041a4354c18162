"""The kinds of runs by the name that `stage` has in a configuration. A kind is one entry here, or of an installed package."""

from dataclasses import dataclass
from typing import Any

from data_pipeline.core import plugins
from pretrain.config.schema import RunConfig

OWN = {"vae": "pretrain.stages.vae:KIND", "dit": "pretrain.stages.dit:KIND"}
"""Where ours are; imported when a run asks for them."""


@dataclass(frozen=True)
class StageKind:
    """All that is known of a stage.

    config: the class of its runs' configurations.
    stage: called with (config, manifest, device) gives what the loop trains (pretrain/stages/base.py).
    """

    config: type[RunConfig]
    stage: Any


def stage_kind(name: str) -> StageKind:
    """The kind of that name. Raises: UserError."""
    return plugins.load("stages", name, OWN)


def stage_names() -> list[str]:
    """All kinds, ours first."""
    return plugins.names("stages", OWN)
