"""The engine against a plain PyTorch loop, and checkpoints between all kinds of sharding, in real processes.

Starting ranks costs seconds, so each start runs many cases (engine_worker.py), and the tests read what came out.
"""

import resource
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from pretrain.engine.engine import Engine
from pretrain.engine.file_memory import in_file
from pretrain.engine.settings import EngineSettings
from pretrain.ranks.distributed import Topology
from tests.pretrain.engine_launch import Result, largest_relative_difference, launch
from tests.pretrain.engine_toy import (
    MUON,
    OPTIMIZER,
    SGD,
    Reference,
    SumStage,
    ToyStage,
    plain_muon,
    plain_sgd,
    plain_training,
    sum_batches,
)

STAGES = (0, 1, 2, 3)
STEPS = 4
SAVED_AT = 2
STATES = ("weight", "exp_avg", "exp_avg_sq", "ema")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's jobs keep runs and results."""
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Float64, one process, no accumulation: what every job must come to."""
    return plain_training(STEPS)


def matrix(folder: Path, world_size: int) -> list[dict]:
    """ZeRO 0-3 x accumulation 1 and 3; those without accumulation also evaluate with the EMA each step and save."""
    plain = [
        {
            "name": f"zero{stage}-accumulate1", "zero_stage": stage, "steps": (0, STEPS), "evaluate": True,
            "run": str(folder / f"ranks{world_size}-zero{stage}"), "save": (SAVED_AT,),
        }
        for stage in STAGES
    ]  # fmt: skip
    accumulating = [
        {"name": f"zero{stage}-accumulate3", "zero_stage": stage, "accumulation": 3, "steps": (0, STEPS)}
        for stage in STAGES
    ]
    return plain + accumulating


def checkpoint_of(folder: Path, run: str, step: int) -> str:
    """A checkpoint's folder."""
    return str(folder / run / "checkpoints" / f"step-{step:09d}")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Result]:
    """Two ranks: the matrix, resumed runs, skipped and poisoned steps, bf16, recomputed activations."""
    cases = matrix(folder, 2)
    for stage in STAGES:
        saved = checkpoint_of(folder, f"ranks2-zero{stage}", SAVED_AT)
        cases += [
            {"name": f"zero{stage}-resumed", "zero_stage": stage, "steps": (SAVED_AT, STEPS), "restore": saved},
            {"name": f"zero{stage}-skipped", "zero_stage": stage, "steps": (0, STEPS), "skip": (1,)},
            {"name": f"zero{stage}-poisoned", "zero_stage": stage, "steps": (0, STEPS), "poison": (1,)},
        ]
    overlapping = {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 100}}
    cases += [
        {
            "name": f"zero{stage}-overlapped",
            "zero_stage": stage,
            "accumulation": 3,
            "steps": (0, STEPS),
            "overrides": overlapping,
        }
        for stage in (1, 2)
    ]
    for stage in (1, 2, 3):
        base = {"zero_stage": stage, "precision": "bf16"}
        saving = {"run": str(folder / f"bf16-zero{stage}"), "save": (SAVED_AT,), "evaluate": True}
        saved = checkpoint_of(folder, f"bf16-zero{stage}", SAVED_AT)
        cases += [
            {"name": f"bf16-zero{stage}", "steps": (0, STEPS)} | saving | base,
            {"name": f"bf16-zero{stage}-resumed", "steps": (SAVED_AT, STEPS), "restore": saved} | base,
            {"name": f"bf16-zero{stage}-sums", "steps": (0, 1), "accumulation": 3, "sums": True} | base,
        ]
    cases += [{"name": f"zero{s}-recompute", "zero_stage": s, "recompute": True, "steps": (0, STEPS)} for s in (1, 3)]
    for stage in (1, 3):  # an optimizer from outside
        base = {"zero_stage": stage, "optimizer": SGD}
        saving = {"run": str(folder / f"sgd-zero{stage}"), "save": (SAVED_AT,), "evaluate": True}
        saved = checkpoint_of(folder, f"sgd-zero{stage}", SAVED_AT)
        cases += [
            {"name": f"sgd-zero{stage}", "steps": (0, STEPS)} | saving | base,
            {"name": f"sgd-zero{stage}-resumed", "steps": (SAVED_AT, STEPS), "restore": saved} | base,
        ]
    for stage in STAGES:
        base = {"zero_stage": stage, "optimizer": MUON}
        saving = {"run": str(folder / f"muon-zero{stage}"), "save": (SAVED_AT,), "evaluate": True}
        saved = checkpoint_of(folder, f"muon-zero{stage}", SAVED_AT)
        cases += [
            {"name": f"muon-zero{stage}", "steps": (0, STEPS)} | saving | base,
            {"name": f"muon-zero{stage}-resumed", "steps": (SAVED_AT, STEPS), "restore": saved} | base,
        ]
    base = {"zero_stage": 1, "precision": "bf16", "optimizer": MUON}
    saved = checkpoint_of(folder, "bf16-muon", SAVED_AT)
    cases += [
        {"name": "bf16-muon", "steps": (0, STEPS), "run": str(folder / "bf16-muon"), "save": (SAVED_AT,)} | base,
        {"name": "bf16-muon-resumed", "steps": (SAVED_AT, STEPS), "restore": saved} | base,
    ]
    in_files = {
        "zero_stage": 3,
        "offload": "nvme",
        "offload_parameters": "nvme",
        "offload_folder": str(folder / "nvme"),
    }
    saving = {"run": str(folder / "ranks2-nvme"), "save": (SAVED_AT,), "evaluate": True}
    saved = checkpoint_of(folder, "ranks2-nvme", SAVED_AT)
    cases += [
        {"name": "nvme", "steps": (0, STEPS)} | saving | in_files,
        {"name": "nvme-resumed", "steps": (SAVED_AT, STEPS), "restore": saved} | in_files,
    ]
    return launch(folder / "two", 2, cases)


@pytest.fixture(scope="module")
def one_rank(folder: Path, two_ranks: dict[str, Result]) -> dict[str, Result]:
    """One rank: the matrix, autocast within the stage, and what two ranks saved, continued under another ZeRO stage."""
    cases = matrix(folder, 1)
    cases.append({"name": "autocast", "zero_stage": 2, "steps": (0, STEPS), "autocast": True})  # after ZeRO-3
    for stage in STAGES:
        saved = checkpoint_of(folder, f"ranks2-zero{stage}", SAVED_AT)
        cases += [
            {
                "name": f"from-zero{stage}", "zero_stage": (stage + 1) % 4, "steps": (SAVED_AT, SAVED_AT + 1),
                "restore": saved, "run": str(folder / f"then1-zero{stage}"), "save": (SAVED_AT + 1,),
            },
            {
                "name": f"loaded-zero{stage}", "zero_stage": (stage + 1) % 4, "steps": (SAVED_AT, SAVED_AT),
                "restore": saved,
            },
        ]  # fmt: skip
    for stage in STAGES:
        saved = checkpoint_of(folder, f"muon-zero{stage}", SAVED_AT)
        elsewhere = {"zero_stage": (stage + 1) % 4, "steps": (SAVED_AT, STEPS), "restore": saved, "optimizer": MUON}
        cases.append({"name": f"muon-from-zero{stage}"} | elsewhere)
        cases.append({"name": f"muon-zero{stage}", "zero_stage": stage, "steps": (0, STEPS), "optimizer": MUON})
    for stage in (1, 3):
        saved = checkpoint_of(folder, f"sgd-zero{stage}", SAVED_AT)
        elsewhere = {"zero_stage": 4 - stage, "steps": (SAVED_AT, STEPS), "restore": saved, "optimizer": SGD}
        cases.append({"name": f"sgd-from-zero{stage}"} | elsewhere)
    return launch(folder / "one", 1, cases)


@pytest.fixture(scope="module")
def three_ranks(folder: Path, one_rank: dict[str, Result]) -> dict[str, Result]:
    """Three ranks, whose ranges overlap those of two: the end of the runs 2 -> 1 -> 3, under yet another ZeRO stage."""
    cases = []
    for stage in STAGES:
        cases += [
            {
                "name": f"from-zero{stage}", "zero_stage": (stage + 2) % 4, "steps": (SAVED_AT + 1, STEPS),
                "restore": checkpoint_of(folder, f"then1-zero{stage}", SAVED_AT + 1),
            },
            {
                "name": f"loaded-zero{stage}", "zero_stage": (stage + 2) % 4, "steps": (SAVED_AT, SAVED_AT),
                "restore": checkpoint_of(folder, f"ranks2-zero{stage}", SAVED_AT),
            },
        ]  # fmt: skip
        cases.append({
            "name": f"muon-from-zero{stage}", "zero_stage": (stage + 2) % 4, "steps": (SAVED_AT, STEPS), "optimizer": MUON,
            "restore": checkpoint_of(folder, f"muon-zero{stage}", SAVED_AT),
        })  # fmt: skip
    return launch(folder / "three", 3, cases)


def assert_equal_to(reference: Reference, result: Result, tolerance: float = 1e-6) -> None:
    """Weights, moments and EMA agree tensor by tensor, losses and gradient norms step by step."""
    assert result.states.keys() == reference.states.keys()
    for state in reference.states:
        assert largest_relative_difference(result.states[state], reference.states[state]) <= tolerance, state
    assert result.notes["losses"] == pytest.approx(reference.losses, rel=tolerance)
    assert result.notes["norms"] == pytest.approx(reference.norms, rel=tolerance)
    assert result.notes["updates"] == len(reference.losses)


def assert_same_bits(one: Result, other: Result) -> None:
    """Weights, moments and EMA agree bit for bit."""
    for state, tensors in one.states.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.states[state][name]), f"{state}/{name}"


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_the_plain_loop(two_ranks, reference, stage, accumulation):
    assert_equal_to(reference, two_ranks[f"zero{stage}-accumulate{accumulation}"])


@pytest.mark.parametrize("stage", [1, 2])
def test_overlapped_communication_of_small_buckets_gives_the_plain_loops_gradients(two_ranks, reference, stage):
    assert_equal_to(reference, two_ranks[f"zero{stage}-overlapped"])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_trains_as_the_plain_loop(one_rank, reference, stage, accumulation):
    assert_equal_to(reference, one_rank[f"zero{stage}-accumulate{accumulation}"])


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_from_outside_trains_resumes_and_moves(one_rank, two_ranks, stage):
    plain, straight = plain_training(STEPS, make_optimizer=plain_sgd), two_ranks[f"sgd-zero{stage}"]
    assert sorted(straight.states) == ["ema", "velocity", "weight"]
    assert_equal_to(plain, straight)
    assert all(straight.notes["checks"].values())
    assert_same_bits(straight, two_ranks[f"sgd-zero{stage}-resumed"])
    moved = one_rank[f"sgd-from-zero{stage}"]  # to one rank and another ZeRO stage
    for state in plain.states:
        assert largest_relative_difference(moved.states[state], plain.states[state]) <= 1e-6, state


@pytest.fixture(scope="module")
def muon_reference() -> Reference:
    """Float64, one process, matrix by matrix."""
    return plain_training(STEPS, make_optimizer=plain_muon)


@pytest.mark.parametrize("stage", STAGES)
def test_muon_trains_as_the_plain_loop_on_one_and_two_ranks(one_rank, two_ranks, muon_reference, stage):
    for results in (one_rank, two_ranks):
        assert_equal_to(muon_reference, results[f"muon-zero{stage}"])
    assert all(two_ranks[f"muon-zero{stage}"].notes["checks"].values())


@pytest.mark.parametrize("stage", STAGES)
def test_muon_resumes_bit_for_bit_and_moves_to_another_sharding(one_rank, two_ranks, muon_reference, stage):
    assert_same_bits(two_ranks[f"muon-zero{stage}"], two_ranks[f"muon-zero{stage}-resumed"])
    moved = one_rank[f"muon-from-zero{stage}"]
    for state in muon_reference.states:
        assert largest_relative_difference(moved.states[state], muon_reference.states[state]) <= 1e-6, state


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_muon_moves_to_three_ranks(three_ranks, muon_reference, stage):
    moved = three_ranks[f"muon-from-zero{stage}"]
    for state in muon_reference.states:
        assert largest_relative_difference(moved.states[state], muon_reference.states[state]) <= 1e-6, state


def test_muon_in_bf16_orthogonalises_in_it_and_resumes_bit_for_bit(two_ranks, muon_reference):
    straight = two_ranks["bf16-muon"]
    matrices = [two_ranks[name].notes["matrices"] for name in ("bf16-muon", "muon-zero1", "bf16-zero1")]
    assert matrices == ["torch.bfloat16", "torch.float32", None]
    assert largest_relative_difference(straight.states["weight"], muon_reference.states["weight"]) < 2e-2
    assert_same_bits(straight, two_ranks["bf16-muon-resumed"])


@pytest.mark.parametrize("stage", [1, 3])
def test_recomputed_activations_change_nothing(two_ranks, reference, stage):
    assert_equal_to(reference, two_ranks[f"zero{stage}-recompute"])


def test_a_stages_own_autocast_region_stays_in_force(one_rank):
    assert_equal_to(plain_training(STEPS, torch.float32, autocast=True), one_rank["autocast"])


@pytest.mark.parametrize("name", [*(f"zero{s}-accumulate1" for s in STAGES), *(f"bf16-zero{s}" for s in (1, 2, 3))])
def test_ema_evaluates_and_leaves_no_trace(two_ranks, name):
    assert two_ranks[name].notes["checks"] == {"ema_used": True, "bitwise": True, "same_loss": True, "training": True}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_continues_bit_for_bit(two_ranks, stage):
    straight, resumed = two_ranks[f"zero{stage}-accumulate1"], two_ranks[f"zero{stage}-resumed"]
    assert_same_bits(straight, resumed)
    assert resumed.notes["losses"] == straight.notes["losses"][SAVED_AT:]
    assert resumed.notes["manifest"] == {"step": SAVED_AT, "extra": {"seen": SAVED_AT - 1}}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_has_fp32_masters_and_resumes_bit_for_bit(two_ranks, reference, stage):
    straight = two_ranks[f"bf16-zero{stage}"]
    assert straight.notes["dtypes"] == ["torch.bfloat16"]
    assert largest_relative_difference(straight.states["weight"], reference.states["weight"]) < 1e-2
    weight = straight.states["weight"]["aux.weight"]
    assert not torch.equal(weight, weight.bfloat16().float()), "the masters are rounded to bf16"
    assert_same_bits(straight, two_ranks[f"bf16-zero{stage}-resumed"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_adds_up_in_fp32_over_micro_batches_and_ranks(two_ranks, stage):
    """Of gradients that bf16 holds exactly: sums in bf16 would be off by 1e-3."""
    found, batches = two_ranks[f"bf16-zero{stage}-sums"], sum_batches(0, 3) + sum_batches(1, 3)
    weights = [p.detach().bfloat16().double() for p in SumStage().parameters()]
    first, second = (sum(numbers[i].double() for numbers in batches) for i in (0, 1))
    norm = float(torch.cat([first, second]).norm())
    assert found.notes["losses"] == pytest.approx([float(weights[0] @ first + weights[1] @ second)], rel=1e-6)
    assert found.notes["norms"] == pytest.approx([norm], rel=1e-6)
    (beta1, beta2), clip = OPTIMIZER.betas, OPTIMIZER.grad_clip / norm
    sums = {"first": clip * first, "second": clip * second}
    means = {name: (1 - beta1) * gradient for name, gradient in sums.items()}
    squares = {name: (1 - beta2) * gradient.square() for name, gradient in sums.items()}
    assert largest_relative_difference(found.states["exp_avg"], means) < 1e-6
    assert largest_relative_difference(found.states["exp_avg_sq"], squares) < 1e-6


@pytest.mark.parametrize("name", ["zero1-accumulate1", "bf16-zero1", "bf16-zero2", "bf16-zero3"])
def test_buffers_keep_their_precision(two_ranks, name):
    buffer = ToyStage().latents_mean
    assert two_ranks[name].notes["buffers"] == {"latents_mean": ["torch.float32", buffer.tolist()]}


def test_a_registered_frozen_model_is_refused_by_name():
    stage = ToyStage()
    stage.teacher = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match=r"registers 2 frozen parameter\(s\), the first is teacher.weight"):
        Engine(stage, EngineSettings(), OPTIMIZER, Topology())


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_on_one_rank_is_a_skipped_step_on_all(two_ranks, stage):
    skipped, poisoned = two_ranks[f"zero{stage}-skipped"], two_ranks[f"zero{stage}-poisoned"]
    assert not torch.isfinite(torch.tensor([poisoned.notes["norms"][1], poisoned.notes["losses"][1]])).any()
    assert_same_bits(skipped, poisoned)
    assert poisoned.notes["updates"] == STEPS - 1


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_continues_what_two_saved_under_another_zero_stage(one_rank, stage):
    shorter, result = plain_training(SAVED_AT + 1), one_rank[f"from-zero{stage}"]
    for state in STATES:
        assert largest_relative_difference(result.states[state], shorter.states[state]) <= 1e-6, state
    assert result.notes["losses"] == pytest.approx(shorter.losses[SAVED_AT:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_means_the_same_under_any_sharding(one_rank, three_ranks, stage):
    assert_same_bits(one_rank[f"loaded-zero{stage}"], three_ranks[f"loaded-zero{stage}"])
    assert three_ranks[f"loaded-zero{stage}"].notes["updates"] == SAVED_AT


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_over_2_1_and_3_ranks_and_three_zero_stages_ends_as_the_plain_loop(three_ranks, reference, stage):
    result = three_ranks[f"from-zero{stage}"]
    for state in STATES:
        assert largest_relative_difference(result.states[state], reference.states[state]) <= 1e-6, state
    assert result.notes["losses"] == pytest.approx(reference.losses[SAVED_AT + 1 :], rel=1e-6)


def test_offloading_to_files_changes_no_bit(folder, two_ranks):
    offloaded = two_ranks["nvme"]
    assert_same_bits(offloaded, two_ranks["zero3-accumulate1"])
    assert_same_bits(offloaded, two_ranks["nvme-resumed"])
    assert all(offloaded.notes["checks"].values())
    # Masters, their gradients, two moments, EMA and parameters, and four copies for the checkpoint.
    assert offloaded.notes["bytes_in_files"] >= 10 * offloaded.notes["bytes_of_masters"]
    assert not list((folder / "nvme").iterdir()), "swap files are left"


def test_a_folder_that_cannot_hold_what_is_offloaded_is_named(tmp_path):
    not_a_folder = tmp_path / "file"
    not_a_folder.touch()
    with pytest.raises(UserError, match=r"train.offload_folder .*file cannot take another"):
        in_file(torch.zeros(3), not_a_folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot take another 0.004 GB: .*36 bytes"):
            in_file(torch.zeros(1_000_000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(in_file(torch.arange(6.0).view(2, 3), tmp_path), torch.arange(6.0).view(2, 3))


@pytest.mark.slow
def test_offload_sub_groups_and_persistent_parameters(folder, reference, muon_reference):
    sub_groups = {"zero_optimization": {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}}
    cases = [
        {"name": f"offload{stage}-{accumulation}", "zero_stage": stage, "offload": "cpu", "accumulation": accumulation}
        for stage in (1, 2, 3)
        for accumulation in (1, 3)
    ]
    cases += [
        {"name": "offload-parameters", "zero_stage": 3, "offload": "cpu", "offload_parameters": "cpu"},
        {"name": "sub-groups", "zero_stage": 3, "overrides": sub_groups},
        *({"name": f"files{stage}", "zero_stage": stage, "offload": "nvme", "accumulation": 3} for stage in (1, 2)),
        {"name": "sub-groups-files", "zero_stage": 3, "overrides": sub_groups, "offload": "nvme"},
        {"name": "sub-groups-offload", "zero_stage": 3, "overrides": sub_groups, "offload": "cpu"},
        *({"name": f"muon-offload{s}", "zero_stage": s, "offload": "cpu", "optimizer": MUON} for s in (1, 2, 3)),
        {
            "name": "muon-sub-groups-files",
            "zero_stage": 3,
            "overrides": sub_groups,
            "offload": "nvme",
            "optimizer": MUON,
        },
    ]
    for case in cases:
        case |= {"steps": (0, STEPS), "evaluate": True, "save": (SAVED_AT,), "run": str(folder / case["name"])}
        case["offload_folder"] = str(folder / f"files-{case['name']}")
    resumed = [
        case | {
            "name": case["name"] + "-resumed", "save": (), "steps": (SAVED_AT, STEPS),
            "restore": checkpoint_of(folder, case["name"], SAVED_AT),
        }
        for case in cases
    ]  # fmt: skip
    for world_size in (1, 2):
        results = launch(folder / f"offload{world_size}", world_size, cases + resumed)
        for case in cases:
            assert_equal_to(muon_reference if "optimizer" in case else reference, results[case["name"]])
            assert_same_bits(results[case["name"]], results[case["name"] + "-resumed"])
            assert all(results[case["name"]].notes["checks"].values()), case["name"]
            notes = results[case["name"]].notes
            assert notes["bytes_in_files"] >= 9 * notes["bytes_of_masters"] * (case.get("offload") == "nvme")


def test_the_table_names_both_groups(two_ranks):
    table = two_ranks["zero2-accumulate1"].notes["table"]
    assert "no decay" in table
    assert "fp32 masters" in table
    assert "whole matrices: this rank computes" in two_ranks["muon-zero2"].notes["table"]
