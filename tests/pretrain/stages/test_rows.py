"""A run's own rows: shorter contexts in training than in what is held out, and the same rows cut otherwise for comparison."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.reading.batch import PREFIX, Batch
from data_pipeline.reading.settings import Split
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.diagnose import diagnosis
from pretrain.ranks.distributed import Topology
from pretrain.session import open_loader
from pretrain.stages.rows import heldout_rows, training_batches
from tests.pretrain import tiny_run

MIN_TOKENS = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of three windows."""
    return tiny_run.write_data(tmp_path_factory.mktemp("rows") / "data")


def config_of(data: Path, folder: Path, **changes: float) -> RunConfig:
    """A causal run on these rows, whose windows are cut as told."""
    split = {"kind": "context", "context_min": 0.1, "context_max": 0.9, "min_tokens": MIN_TOKENS} | changes
    values = {
        "stage": "ar",
        "model": {"width": 16, "num_layers": 1, "head_dim": 8},
        "data": {"path": str(data), "streams": 2, "rows_per_step": 4, "micro_batch_rows": 1, "split": split},
        "optimizer": {"kind": "adamw", "lr": 1e-3, "weight_decay": 0.0, "grad_clip": 1.0, "ema_decay": 0.9},
        "train": {"run": str(folder / "run"), "steps": 4},
        "schedule": {"warmup_steps": 1},
    }
    (folder / "config.json").write_text(json.dumps(values))
    return load_config(str(folder / "config.json"), [])


def shares(batches: list[Batch]) -> list[float]:
    """The context's share of each window."""
    found = []
    for batch in batches:
        for length, role, window in zip(batch.segment_lengths, batch.segment_roles, batch.segment_windows, strict=True):
            if role == PREFIX:
                found.append(length / batch.window_lengths[window])
    return found


def test_training_cuts_shorter_contexts_and_what_is_held_out_stays_as_it_was(data: Path, tmp_path: Path) -> None:
    plain, shorter = (config_of(data, tmp_path, **changes) for changes in ({}, {"training_context_max": 0.3}))
    rounding = 1 / 8  # of a token, and the shortest window has eight
    before, after = (shares(training_batches(config, 32)) for config in (plain, shorter))
    assert max(before) > 0.6
    assert max(after) <= 0.3 + rounding
    assert len(before) == len(after) > 90
    with open_loader(shorter, Topology(), 0) as loader:
        loop = [batch for _ in range(8) for batch in loader.next_step()]
    assert shares(loop) == after
    held = [shares(list(heldout_rows(config, 8))) for config in (plain, shorter)]
    assert held[0] == held[1]
    assert max(held[1]) > 0.6
    compared = diagnosis.training(shorter, torch.device("cpu"), 32)  # with what is held out
    assert shares(compared) == before


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "truncate", "training_context_max": 0.5},
        {"kind": "context", "training_context_max": 0.05},
        {"kind": "context", "training_context_max": 1.0},
    ],
)
def test_a_training_share_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"training_context_max is .*; expected kind context, and context_min <="):
        Split(**wrong)


def test_without_one_training_cuts_as_ever() -> None:
    split = Split(kind="context")
    assert split.in_training == split
    assert Split(kind="context", training_context_max=0.5).in_training == Split(kind="context", context_max=0.5)
