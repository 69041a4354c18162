"""At ZeRO 3 a stage is in pieces from the first: what ranks hold meanwhile, and that no value is another for it."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pretrain.checkpoint.read import read_tensors
from tests.pretrain import forked_ranks, tiny_pipeline
from tests.pretrain.conftest import Trained
from tests.pretrain.pieces_worker import TRAININGS

RANKS = 2
MODELS = ("vae", "categorical", "adaln_zero", "tokens", "tied")


def starts(trained: Trained, exported: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """Configurations that begin with another run's weights."""
    found = {}
    for name, source in (("run", trained.dit), ("export", exported)):
        found[name] = tiny_pipeline.dit_values(trained.data, trained.vae, folder / name, init_from=str(source))
        found[name]["flow"]["token_loss_weight"] = 0.5 * (name == "export")
    student = tiny_pipeline.dit_values(trained.data, trained.vae, folder / "student")
    found["student"] = student | {
        "stage": "distill",
        "distill": {"teacher": str(trained.dit), "num_steps": 3, "teacher_steps": 2, "guidance_scale": 3.0},
    }
    return found


@pytest.fixture(scope="module")
def found(trained: Trained, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("pieces")
    configs = starts(trained, exported, folder)
    save_file(read_tensors(trained.dit, "ema"), folder / "expected.safetensors")
    job = {"configs": configs, "expected": {name: str(folder / "expected.safetensors") for name in configs}}
    (folder / "job.json").write_text(json.dumps(job))
    log = folder / "ranks.log"
    ranks = forked_ranks.start_module("tests.pretrain.pieces_worker", [str(folder / "job.json")], log, RANKS)
    assert forked_ranks.finish(ranks, 300) == [0] * RANKS, log.read_text()[-6000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(RANKS)]


def test_no_rank_holds_more_than_its_share_and_a_module_while_a_stage_is_built(found: list[dict[str, Any]]) -> None:
    for rank in found:
        peaks = rank["peaks"]
        assert (
            peaks["pieces"] <= peaks["share"] + 2 * peaks["block"]
        )  # gloo's threads let go of a tensor when they come to it
        assert peaks["share"] + 2 * peaks["block"] < 0.6 * peaks["model"]
        assert peaks["whole"] >= peaks["model"]


@pytest.mark.parametrize("name", [*MODELS, "numbers_that_follow"])
def test_pieces_begin_with_the_values_of_a_whole_model_those_of_rank_0(found: list[dict[str, Any]], name: str) -> None:
    assert all(rank["drawn"][name] for rank in found)


@pytest.mark.parametrize("name", TRAININGS)
def test_what_was_built_in_pieces_trains_bit_for_bit_as_what_was_cut_later(
    found: list[dict[str, Any]], name: str
) -> None:
    assert all(rank["trained"][name] for rank in found)


@pytest.mark.parametrize(("name", "kept"), [("run", []), ("export", ["token_head.weight"]), ("student", [])])
def test_another_runs_weights_are_read_one_by_one_into_pieces(
    found: list[dict[str, Any]], name: str, kept: list[str]
) -> None:
    for rank in found:
        notes = rank["started"][name]
        assert notes["same"]
        assert notes["cut"]
        assert notes["kept"] == kept
        assert notes["peak"] <= 0.75 * notes["model"]  # of few tensors; all at once would be 1.16


@pytest.mark.parametrize("way", ["method", "init", "function"])
def test_what_would_be_written_into_nothing_is_refused(found: list[dict[str, Any]], way: str) -> None:
    for rank in found:
        assert "on a parameter of shape [5, 3] of which this rank holds a piece" in rank["refused"][way]
