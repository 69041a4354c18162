"""The kinds of runs by the name that `stage` has in a configuration. A kind is one entry here, or of an installed package."""

import contextlib
import pkgutil
from dataclasses import dataclass
from typing import Any

from data_pipeline.core import plugins
from data_pipeline.core.errors import UserError, reason
from pretrain.config.schema import RunConfig

OWN = {
    "vae": "pretrain.stages.vae_config:KIND",
    "dit": "pretrain.stages.dit_config:KIND",
    "distill": "pretrain.stages.distill_config:KIND",
    "ar": "pretrain.stages.token_config:AR",
    "mdlm": "pretrain.stages.token_config:MDLM",
}
"""Where ours are; imported when a run asks for them."""


@dataclass(frozen=True)
class StageKind:
    """All that is known of a stage. docs/extending.md adds one.

    All but the configuration is named by its place ("module:attribute") and imported when it is asked for (`load`): a
    mistake in a configuration is found without torch, and training does not import the diagnosis.

    Attributes:
        config: the class of its runs' configurations.
        stage: place of what gives, called with (config, manifest of the data, device), what the loop trains
            (pretrain/stages/base.py). It builds: it neither measures nor writes, and meets other ranks in `weights_on` alone.
        inputs: place of a function of (config) that gives the fingerprint of everything frozen that a run reads besides tokens, by
            the key that names it. A resumed run must find them unchanged. Raises UserError for what is not there.
        measure: place of a function of (config, manifest, device, together) that puts into the run folder what must be known before the
            stage can be built. All ranks call it and may share out the work (`Together`, pretrain/ranks/distributed.py); rank 0
            writes. It does nothing if it has been done.
        samples: place of a function of (`Occasion`, pretrain/stages/base.py) that gives texts for the log at held-out evaluations, one
            dictionary "name of a column" -> text each; all ranks call it, rank 0's are logged (pretrain/stages/samples.py).
        diagnosis: place of a `Diagnosis` (pretrain/diagnose/diagnosis.py), for `textldm diagnose`.
        outline: place of a function of (config, device, size of the vocabulary or 0) that gives an `Outline` (pretrain/stages/outline.py),
            for `textldm plan`.
        export: place of a function of (`Source`) that gives an `Exported` (pretrain/export/parts.py), for `textldm convert`.
        from_export: place of a function of (config, config.json of an export, its tensors by name) that gives them by the stage's names,
            for `train.init_from` (pretrain/stages/from_export.py); they are read when they are asked for, of which `renamed`
            (pretrain/checkpoint/tensor_files.py) makes the same. Raises UserError for what does not fit.
    """

    config: type[RunConfig]
    stage: str
    inputs: str | None = None
    measure: str | None = None
    samples: str | None = None
    diagnosis: str | None = None
    export: str | None = None
    outline: str | None = None
    from_export: str | None = None

    def load(self, field: str) -> Any:
        """Import what the entry names in a field; None where it names nothing. Raises: UserError."""
        place = getattr(self, field)
        try:
            return place and pkgutil.resolve_name(place)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"{field} of the StageKind with {self.config.__name__} names {place}, which cannot be loaded: {reason(error)}; correct the"
                " entry, or install what is missing"
            ) from error


def stage_kind(name: str) -> StageKind:
    """The kind of that name. Raises: UserError."""
    return plugins.load("stages", name, OWN)


def stage_names() -> list[str]:
    """All kinds, ours first."""
    return plugins.names("stages", OWN)


def known_kinds() -> dict[str, StageKind]:
    """All kinds by name but those that cannot be loaded, whose packages are nobody's business who did not ask for them."""
    found = {}
    for name in stage_names():
        with contextlib.suppress(UserError):
            found[name] = stage_kind(name)
    return found
