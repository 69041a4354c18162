"""The real stages in miniature: every sharding trains them as one plain PyTorch loop does."""

from pathlib import Path
from typing import Any

import pytest

from tests.pretrain import tiny_pipeline, tiny_run
from tests.pretrain.engine_launch import Result, largest_relative_difference, launch

STEPS, ROWS = 3, 12
RECOMPUTED = (1, 2)
TOKENS_AT = (1, 3)
BASELINES, BASELINE_ZERO_STAGES = ("ar", "mdlm"), (1, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, runs and results."""
    folder = tmp_path_factory.mktemp("stages")
    tiny_pipeline.write_data(folder / "data")
    return folder


def config_of(folder: Path, stage: str, run: str) -> dict[str, Any]:
    """Stage 1 with truncation (two encodings a window) and REPA; stage 2 on the VAE that stage 1 left; the baselines over tokens."""
    config = tiny_run.config_values(folder / "data", folder / run)
    config["data"] |= {"rows_per_step": ROWS, "streams": 4}
    config["data"]["split"] = {"kind": "truncate" if stage == "vae" else "context"}
    if stage == "vae":
        return config
    del config["repa"]
    if stage in BASELINES:
        return config | {"stage": stage, "model": {"width": 32, "num_layers": 2, "head_dim": 16}}
    model = {"latent_dim": 4, "width": 32, "num_layers": 2, "head_dim": 16, "vae": str(folder / "vae")}
    return config | {"stage": "dit", "model": model, "flow": {"statistics_rows": 12}}


def with_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """With a categorical head, whose logits learn both ways: their weight is used outside its own module's forward pass."""
    config["model"] |= {"head": "categorical"}
    config["flow"] |= {"token_loss_weight": 1.0, "through_tokens": True}
    return config


def jobs(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """Stage x ZeRO 0-3 x accumulation 1 and 3; on one rank also the plain loops, and first the VAE for stage 2."""
    found = []
    for stage in ("vae", "dit"):
        if world_size == 1:
            config = config_of(folder, stage, stage)
            if stage == "vae":
                found.append({"name": "for-dit", "config": config, "zero_stage": 0, "accumulation": 1, "steps": 1})
            found.append({"name": f"{stage}-plain", "config": config, "zero_stage": None, "steps": STEPS})
            if stage == "dit":
                found.append(found[-1] | {"name": "muon-plain", "optimizer": "muon"})
                found += [
                    found[-2] | {"name": "tokens-plain", "config": with_tokens(config_of(folder, stage, "tokens"))}
                ]
        for zero_stage in range(4):
            for accumulation in (1, 3):
                name = f"{stage}-{zero_stage}-{accumulation}"
                config = config_of(folder, stage, f"run{world_size}-{name}")
                found.append(
                    {
                        "name": name,
                        "config": config,
                        "zero_stage": zero_stage,
                        "accumulation": accumulation,
                        "steps": STEPS,
                    }
                )
            if stage == "dit":
                muon = {"name": f"muon-{zero_stage}", "optimizer": "muon", "accumulation": 1}
                found.append(found[-1] | muon)
            if stage == "dit" and zero_stage in TOKENS_AT:
                config = with_tokens(config_of(folder, stage, f"run{world_size}-tokens-{zero_stage}"))
                found.append(found[-2] | {"name": f"tokens-{zero_stage}", "config": config})
        for every in RECOMPUTED:  # blocks: all, every second one
            config = config_of(folder, stage, f"run{world_size}-{stage}-recomputed-{every}")
            config["train"]["activation_checkpointing"] = every
            job = {"zero_stage": 3, "accumulation": 1, "steps": STEPS}
            found.append({"name": f"{stage}-recomputed-{every}", "config": config} | job)
    for stage in BASELINES:
        for zero_stage in (*[None] * (world_size == 1), *BASELINE_ZERO_STAGES):
            name = f"{stage}-plain" if zero_stage is None else f"{stage}-{zero_stage}"
            config = config_of(folder, stage, f"run{world_size}-{name}")
            job = {"zero_stage": zero_stage, "accumulation": 1, "steps": STEPS}
            found.append({"name": name, "config": config} | job)
    return found


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> dict[str, Result]:
    return launch(folder / "one", 1, jobs(folder, 1), worker="tests.pretrain.stage_worker")


@pytest.fixture(scope="module")
def two_ranks(folder: Path, one_rank: dict[str, Result]) -> dict[str, Result]:
    return launch(folder / "two", 2, jobs(folder, 2), worker="tests.pretrain.stage_worker")


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_every_sharding_trains_as_the_plain_loop(one_rank, two_ranks, stage, zero_stage, accumulation):
    for results in (one_rank, two_ranks):
        assert_equal(results[f"{stage}-{zero_stage}-{accumulation}"], one_rank[f"{stage}-plain"])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", TOKENS_AT)
def test_every_sharding_trains_a_categorical_head_as_the_plain_loop(one_rank, two_ranks, zero_stage):
    for results in (one_rank, two_ranks):
        assert_equal(results[f"tokens-{zero_stage}"], one_rank["tokens-plain"])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", range(4))
def test_muon_trains_a_real_stage_as_the_plain_loop(one_rank, two_ranks, zero_stage):
    for results in (one_rank, two_ranks):
        assert_equal(results[f"muon-{zero_stage}"], one_rank["muon-plain"])


@pytest.mark.slow
@pytest.mark.parametrize("every", RECOMPUTED)
@pytest.mark.parametrize("stage", ["vae", "dit"])
def test_recomputed_blocks_change_nothing(one_rank, two_ranks, stage, every):
    for results in (one_rank, two_ranks):
        assert_equal(results[f"{stage}-recomputed-{every}"], one_rank[f"{stage}-plain"])


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", BASELINE_ZERO_STAGES)
@pytest.mark.parametrize("stage", BASELINES)
def test_the_baselines_train_as_the_plain_loop(one_rank, two_ranks, stage, zero_stage):
    for results in (one_rank, two_ranks):
        assert_equal(results[f"{stage}-{zero_stage}"], one_rank[f"{stage}-plain"])


def assert_equal(found: Result, expected: Result) -> None:
    """Weights, EMA and moments agree tensor by tensor."""
    for state in expected.states:
        # Moments are gradients, which are sums with cancellation, and their squares, which double a relative error.
        tolerance = 1e-6 if state in ("weight", "ema") else 4e-6
        assert largest_relative_difference(found.states[state], expected.states[state]) <= tolerance, state
