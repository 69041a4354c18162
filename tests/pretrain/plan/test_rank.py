"""`train.py --dry-run --as-rank`: the plan's numbers, and those of a real engine (two ranks: test_states.py)."""

import gc
from pathlib import Path

import pytest

from benchmarks.plan import MODELS, Whole, live_bytes, live_tensors, outline, planned_states
from pretrain.config.load import load_config
from pretrain.plan.estimate import GIB, Hardware, Text, make_plan
from pretrain.plan.rank import ACTIVATIONS, plan_rank, report
from pretrain.stages.outline import Windows
from pretrain.train import main
from tests.pretrain import tiny_run

TEXT = Text(512, 128)
SMALL = ("model.width=128", "model.num_layers=2", "train.activation_checkpointing=1")


@pytest.mark.parametrize(("nodes", "micro_batch"), [(64, 6), (1, 48)])
@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("dit_b", SMALL),
        ("mdlm_b", (*SMALL, "model.vocab_size=2000", "optimizer.kind=muon", "optimizer.matrix_lr=0.01")),
    ],
)
def test_the_numbers_are_those_of_the_plan(config: str, overrides: tuple, nodes: int, micro_batch: int) -> None:
    wanted = load_config(config, [*overrides, f"data.micro_batch_rows={micro_batch}"])
    hardware = Hardware(nodes, 8, memory_bytes=80 * GIB)
    for choice in make_plan(wanted, hardware, TEXT, 2000).choices:
        if not choice.activation_checkpointing:
            continue
        wanted.train.zero_stage = choice.zero_stage
        found = plan_rank(wanted, 0, hardware.ranks, TEXT, 2000)
        memory = dict(found.memory)
        assert found.micro_batch_rows == choice.micro_batch_rows == wanted.data.rank_rows(hardware.ranks)
        assert sum(memory.values()) == choice.memory
        assert memory["weights"] == choice.weights
        assert memory["gradients"] == choice.gradients
        assert memory["frozen models"] == choice.frozen
        assert memory[ACTIVATIONS] == choice.fixed_bytes + choice.micro_batch_rows * choice.row_bytes
        assert sum(found.sent.values()) == choice.sent_bytes
        of_states = ("masters", "exp_avg", "exp_avg_sq", "momentum", "moving average (EMA)")
        assert sum(memory.get(kind, 0) for kind in of_states) == choice.states


@pytest.mark.parametrize(
    ("precision", "stage"),
    [pytest.param("fp32", 1, marks=pytest.mark.slow), ("bf16", 2), pytest.param("bf16", 3, marks=pytest.mark.slow)],
)
def test_one_rank_holds_what_a_real_engine_does(precision: str, stage: int) -> None:
    from pretrain.engine.engine import Engine, EngineSettings
    from pretrain.engine.optimizer_settings import AdamWSettings
    from pretrain.ranks.distributed import init_distributed

    topology = init_distributed(300)
    kept = [tensor.detach() for tensor in live_tensors(and_garbage=True)]  # no address comes again
    known = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.device.type == "cpu"}
    model = Whole(outline(*MODELS["ar"][:2], "cpu"))
    engine = Engine(model, EngineSettings(zero_stage=stage, precision=precision), AdamWSettings(lr=1e-3), topology)
    assert gc.get_freeze_count() > 10_000  # what was imported: nobody looks for garbage there
    engine.forward_backward(Windows([8]), {}, last=True)
    engine.measure()
    engine.step(0, 1e-3)
    engine.forward_backward(Windows([8]), {}, last=True)
    engine.measure()
    measured = live_bytes(known)
    engine.close()
    assert planned_states(precision, stage, 1) == pytest.approx(measured, rel=0.05)


def test_a_rank_says_its_own_rows() -> None:
    config = load_config(
        "ar_b",
        ["model.width=64", "model.num_layers=1", "model.vocab_size=99", "data.streams=6", "data.rows_per_step=12"],
    )
    first, last = (plan_rank(config, rank, 5, Text(8, 8)) for rank in (0, 4))
    assert [(lane.stream, lane.place) for lane in first.lanes] == [(0, 0), (5, 0), (4, 1)]
    assert "3 of a step's 12 rows, of stream(s) 0, 4, 5; 1 micro-batch(es) of 3 row(s)" in report(first)
    assert "2 of a step's 12 rows, of stream(s) 3, 4, and 1 of filler;" in report(last)
    assert "nothing is sent" in report(plan_rank(config, 0, 1, Text(8, 8)))


def test_offloaded_states_lie_on_the_host() -> None:
    config = load_config("dit_b", [*SMALL, "train.offload_optimizer=cpu"])
    plan = plan_rank(config, 0, 8, TEXT, 2000)
    here = plan_rank(load_config("dit_b", SMALL), 0, 8, TEXT, 2000)
    assert plan.memory["masters"] == 0 < plan.offloaded
    assert sum(here.memory.values()) - sum(plan.memory.values()) == plan.offloaded
    assert "on the host (cpu): states" in report(plan)


def test_the_command_needs_no_data_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tiny_run.config_values(tmp_path / "data", tmp_path / "run")
    values["model"]["vocab_size"] = 2000
    config = tiny_run.write_config(tmp_path / "c.json", values)
    assert main(["--config", str(config), "--dry-run", "--as-rank", "3/512"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "as rank 3 of 512: ZeRO 1, fp32",
        "masters",
        "together",
        "no decay",
        "sent in a step",
        "bucket(s)",
        "1 of a step's 8 rows",
    ):
        assert words in printed
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dry-run", "--as-rank", "512/512"], "'512/512'; expected RANK/RANKS"),
        (["--dry-run", "--as-rank", "first"], "'first'; expected RANK/RANKS"),
        (["--as-rank", "0/512"], "add --dry-run"),
    ],
)
def test_mistakes_name_the_option(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "dit_b", *arguments]) == 2
    assert expected in capsys.readouterr().err
