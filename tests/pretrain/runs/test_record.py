"""What a checkpoint says of its run comes back as it was, and what says nothing of a run is refused in one line."""

import json

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.config.load import load_config
from pretrain.faults.spikes import GuardState
from pretrain.runs.record import RunRecord
from pretrain.telemetry.record import TelemetryState


def test_a_record_survives_json_and_knows_its_configuration(trained) -> None:
    config = load_config(trained.dit / "config.json")
    record = RunRecord.of_run(
        config,
        Manifest.load(trained.data),
        inputs={"model.vae": "f" * 64},
        guard=GuardState(norms=[1.0, 2.5], skipped_steps=[7]),
        telemetry=TelemetryState(productive_s=3.5),
        rewinds=1,
    )
    again = RunRecord.model_validate(json.loads(json.dumps(record.extra())))
    assert again == record
    assert again.run_config("x") == config
    assert again.stage == "dit"


def test_a_run_records_what_it_was_given(trained) -> None:
    saved = read_manifest(checkpoint_of(trained.dit))
    record = RunRecord.of_checkpoint(saved)
    assert record.data_fingerprint == Manifest.load(trained.data).fingerprint
    assert record.inputs == {"model.vae": read_manifest(checkpoint_of(trained.vae)).fingerprint}
    assert len(record.guard.norms) == saved.step
    assert record.telemetry.productive_s > 0


@pytest.mark.parametrize("extra", [{}, {"config": 3}, {"note": 7}])
def test_a_checkpoint_of_something_else_is_refused(trained, extra: dict) -> None:
    saved = read_manifest(checkpoint_of(trained.dit))
    saved.extra.clear()
    saved.extra.update(extra)
    with pytest.raises(UserError, match=r"step-000000002 does not say which run it is of \(\w+: "):
        RunRecord.of_checkpoint(saved)
