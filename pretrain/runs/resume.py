"""Whether a run may go on from a checkpoint: the same data, the same frozen inputs, and only changes that are allowed."""

from collections.abc import Collection, Mapping
from pathlib import Path

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.find import had_checkpoints
from pretrain.config.resume import Difference, refuse_changes, resume_differences
from pretrain.config.schema import RunConfig
from pretrain.runs.record import RunRecord


def refuse_lost_checkpoints(run: Path) -> None:
    """Raise UserError if a run without a complete checkpoint once had one: starting over unasked would hide that."""
    if had_checkpoints(run):
        raise UserError(
            f"{run} had checkpoints, but none of them is complete any more; start over with --fresh, or restore them"
        )


def allowed_differences(
    earlier: RunRecord, config: RunConfig, manifest: Manifest, inputs: Mapping[str, str], allowed: Collection[str] = ()
) -> list[Difference]:
    """What differs from the run as it was, all of it allowed. Raises: UserError for what is not.

    Args:
        manifest, inputs: the data and the frozen inputs' fingerprints of now.
        allowed: keys that --allow-change names.
    """
    run = config.run_folder
    if earlier.data_fingerprint != manifest.fingerprint:
        raise UserError(
            f"{run} cannot resume: its data's fingerprint was {earlier.data_fingerprint[:16]}, that of"
            f" {config.data.path} is {manifest.fingerprint[:16]}. Set data.path back, or name another folder with --run"
        )
    differences = resume_differences(earlier.config, config)
    refuse_changes(differences, allowed, run)
    refuse_other_inputs(earlier.inputs, inputs, allowed, run)
    return differences


def refuse_other_inputs(
    old: Mapping[str, str], new: Mapping[str, str], allowed: Collection[str], run: str | Path
) -> None:
    """Raise UserError if a resumed run would read another cache or VAE than before, though perhaps by the same name."""
    for name in sorted(old.keys() & new.keys() - set(allowed)):
        if old[name] != new[name]:
            raise UserError(
                f"{run} cannot resume: what {name} names had fingerprint {old[name][:16]} and has {new[name][:16]}. Put the"
                f" old one back, or add --allow-change {name}"
            )
