"""What our stages read besides tokens, by fingerprints (`StageKind.inputs`). Without torch: it is asked for before anything slow."""

from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.format.manifest import FeatureManifest
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.stages.exported import export_fingerprint, exported_folder, exported_vae

if TYPE_CHECKING:
    from pretrain.stages.distill_config import DistillRun
    from pretrain.stages.dit_config import DiTRun
    from pretrain.stages.vae_config import VAERun

VAE_KEY, FEATURES_KEY, TEACHER_KEY = "model.vae", "repa.features", "distill.teacher"


def of_vae(config: "VAERun") -> dict[str, str]:
    """The feature cache, if one is read. Raises: UserError."""
    features = config.features_folder()
    return {FEATURES_KEY: FeatureManifest.load(features, f"--set {FEATURES_KEY}=").fingerprint} if features else {}


def of_dit(config: "DiTRun") -> dict[str, str]:
    """The VAE's checkpoint. Raises: UserError."""
    return {VAE_KEY: vae_fingerprint(config.model.vae)}


def of_distill(config: "DistillRun") -> dict[str, str]:
    """The VAE's checkpoint and the teacher's. Raises: UserError."""
    teacher, named_by = config.distill.teacher, f"--set {TEACHER_KEY}="
    folder = exported_folder(teacher, named_by)
    found = (
        read_manifest(checkpoint_of(teacher, named_by)).fingerprint if folder is None else export_fingerprint(folder)
    )
    return of_dit(config) | {TEACHER_KEY: found}


def vae_fingerprint(run: str | Path) -> str:
    """Hash of what `load_vae` takes, a checkpoint or an export: which VAE a DiT was trained with.

    Raises: UserError, see `checkpoint_of` and `exported_vae`.
    """
    named_by = f"--set {VAE_KEY}="
    if (folder := exported_vae(run, named_by)) is not None:
        return export_fingerprint(folder)
    return read_manifest(checkpoint_of(run, named_by)).fingerprint
