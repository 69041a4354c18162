"""What a run's configuration names is read only if it is what the run was made from: the folder may have been downloaded, and then
somebody else wrote there which files are read here (docs/security.md).
"""

from collections.abc import Collection

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import is_url
from data_pipeline.format.manifest import FeatureManifest, Manifest
from pretrain.checkpoint.find import stated_fingerprint
from pretrain.config.schema import RunConfig
from pretrain.runs.record import RunRecord
from pretrain.stages.exported import export_fingerprint, exported_folder, exported_vae
from pretrain.stages.inputs import FEATURES_KEY, TEACHER_KEY, VAE_KEY

DATA_KEY = "data.path"


def check_recorded(config: RunConfig, record: RunRecord, given: Collection[str] = ()) -> None:
    """The data, feature cache, VAE and teacher that the configuration names have the fingerprints that the run's checkpoint recorded. No
    more of them than manifests is looked at, and no URL is asked.

    Args:
        given: keys that the user has set to places of his own, which are not checked.

    Raises: UserError.
    """
    features, vae = config.features_folder(), getattr(getattr(config, "model", None), "vae", None)
    teacher = getattr(getattr(config, "distill", None), "teacher", None)
    named = {DATA_KEY: config.data.path, FEATURES_KEY: features, VAE_KEY: vae, TEACHER_KEY: teacher}
    recorded = record.inputs | {DATA_KEY: record.data_fingerprint}
    for key, place in named.items():
        if place is None or key in given or key not in recorded:
            continue
        if is_url(place):
            raise UserError(
                f"the run's configuration names {place}, and what a run names is not fetched: if you know that place, add"
                f" --set {key}={place}"
            )
        found = _stated(key, place)
        if found is not None and found != recorded[key]:
            raise UserError(
                f"{key} of the run's configuration is {place}, whose fingerprint is {found[:16]}; the run was made from"
                f" {recorded[key][:16]}: say where that is with --set {key}=, or set it to {place} if that is meant"
            )


def _stated(key: str, place: str) -> str | None:
    """The fingerprint that a folder states, or that an export has; of a folder without either None: whoever loads it says so.

    Raises: UserError.
    """
    if key in (VAE_KEY, TEACHER_KEY):
        folder = (exported_vae if key == VAE_KEY else exported_folder)(place, f"--set {key}=")
        return stated_fingerprint(place) if folder is None else export_fingerprint(folder)
    kind = Manifest if key == DATA_KEY else FeatureManifest
    return kind.load(place, f"--set {key}=").fingerprint
