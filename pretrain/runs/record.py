"""What a checkpoint says of the run that wrote it: the one place that writes and reads it.

It lies in the checkpoint's manifest under `extra` (pretrain/checkpoint/manifest.py), so it is JSON.
"""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.config.load import parse_config
from pretrain.config.schema import RunConfig
from pretrain.faults.spikes import GuardState
from pretrain.runs.commit import source_commit
from pretrain.telemetry.record import TelemetryState


class RunRecord(BaseModel):
    """The run as it was when the checkpoint was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    """Its configuration as JSON: the version that wrote it may have known other keys. `run_config` parses it."""
    data_fingerprint: str
    """Of the prepared data (data_pipeline/format/manifest.py)."""
    tokenizer_sha256: str
    """Of the data's tokenizer."""
    inputs: dict[str, str] = {}
    """Fingerprints of what the run reads besides tokens, by the key that names it (`StageKind.inputs`)."""
    guard: GuardState = GuardState()
    """Which steps were skipped, and the norms that the next ones are judged by."""
    telemetry: TelemetryState = TelemetryState()
    """What the log goes on from."""
    commit: str = ""
    """Of the code that wrote it (commit.py)."""
    rewinds: int = 0
    """How often the run has left out rows (train.rewind)."""

    @classmethod
    def of_run(cls, config: RunConfig, manifest: Manifest, **state: Any) -> Self:
        """The record of a run on prepared data; `state` are the other fields."""
        return cls(
            config=config.told(),
            data_fingerprint=manifest.fingerprint,
            tokenizer_sha256=manifest.tokenizer.sha256,
            commit=source_commit(),
            **state,
        )

    @classmethod
    def of_checkpoint(cls, saved: CheckpointManifest) -> Self:
        """What a checkpoint holds. Raises: UserError when it is not one of a run."""
        try:
            return cls.model_validate(saved.extra)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{saved.checkpoint} does not say which run it is of ({where}: {problem['msg']}); expected a checkpoint that"
                " pretrain/train.py of this version wrote"
            ) from None

    @property
    def stage(self) -> str:
        """The name of its stage."""
        return self.config.get("stage", "")

    def run_config(self, source: str) -> RunConfig:
        """Its configuration, parsed and checked; messages name `source`. Raises: UserError."""
        return parse_config(self.config, source).without_deletions()

    def extra(self) -> dict[str, Any]:
        """The record as the dictionary that a checkpoint keeps under `extra`."""
        return self.model_dump(mode="json")
