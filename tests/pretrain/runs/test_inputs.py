"""What a run reads is read once by each host, however many ranks it has and however often they evaluate."""

import os
import time
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from pretrain.config.load import load_config
from pretrain.runs.inputs import find_inputs, read_once_a_host
from tests.pretrain import forked_ranks, tiny_run


def test_a_host_opens_the_manifest_once(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    hour_ago = time.time() - 3600  # what was just written may still change unnoticed, and is read again
    os.utime(data / "manifest.json", (hour_ago, hour_ago))
    config = tiny_run.write_config(tmp_path / "run.json", tiny_run.config_values(data, tmp_path / "run", eval_every=2))
    noted = {"COUNTED": str(data), "COUNTED_IN": f"{tmp_path}/opens-"}
    ranks = forked_ranks.start(config, module="tests.pretrain.counted_opens", **noted)
    assert forked_ranks.finish(ranks) == [0, 0], config.with_suffix(".log").read_text()[-5000:]
    opened = [(tmp_path / f"opens-{rank}").read_text().splitlines() for rank in range(2)]
    assert opened == [[f"{data}/manifest.json"], []]


def test_other_hosts_read_their_own_and_what_is_missing_is_said_by_the_usual_reader(tmp_path: Path) -> None:
    """Rank 2 is the second host's first, rank 3 its second."""
    data = tiny_run.write_data(tmp_path / "data")
    config = load_config(tiny_run.write_config(tmp_path / "run.json", tiny_run.config_values(data, tmp_path / "run")))
    manifest, own = data / "manifest.json", (data / "manifest.json").read_bytes()
    theirs = (tiny_run.write_data(tmp_path / "theirs", seed=1) / "manifest.json").read_bytes()

    def found(rank: int, local_rank: int, told: bytes) -> bytes:
        manifest.touch()  # what an earlier call has read counts no more
        read_once_a_host(config, rank, local_rank, lambda text: text if rank == 0 else told)
        return find_inputs(config).manifest.model_dump_json().encode()

    assert found(0, 0, b"") == own
    assert found(2, 0, theirs) == own
    assert found(3, 1, theirs) == theirs
    assert found(3, 1, b"") == own
    manifest.write_bytes(theirs)
    assert find_inputs(config).manifest.model_dump_json().encode() == theirs


def test_a_process_reads_a_manifest_again_only_when_it_has_changed(tmp_path: Path) -> None:
    data = tiny_run.write_data(tmp_path / "data")
    hour_ago = time.time() - 3600
    os.utime(data / "manifest.json", (hour_ago, hour_ago))
    first = Manifest.load(data)
    assert Manifest.load(data) is first
    os.utime(data / "manifest.json", (hour_ago, hour_ago + 1))
    assert Manifest.load(data) is not first
    (data / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="manifest"):
        Manifest.load(data)
    (data / "manifest.json").unlink()
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(data)
