"""Configurations: every shipped one holds, mistakes are named with their remedy, what a resumed run may change."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from modeling.layers import Transformer
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from pretrain.config import __main__ as config_module
from pretrain.config.load import (
    CONFIG_FOLDER,
    check_ranks,
    describe,
    load_config,
    micro_batch_size,
    refuse_changes,
    resume_differences,
)
from pretrain.stages.build import prepare_blocks
from pretrain.stages.dit import DiTRun, times_of
from pretrain.stages.vae import VAERun

SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.json"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_parse_and_survive_being_written_and_read_again(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.run_folder.parts[0] == "runs"
    path = tmp_path / "config.json"
    path.write_text(config.model_dump_json())
    assert load_config(path) == config


def test_the_whole_ladder_is_shipped() -> None:
    ladder = {"vae_base", "dit_b", "dit_l", "dit_xl", "dit_2b", "dit_7b", "quickstart_vae", "quickstart_dit"}
    assert ladder <= set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "millions"), [("dit_b", 113), ("dit_l", 327), ("dit_xl", 767), ("dit_2b", 1890), ("dit_7b", 6443)]
)
def test_dit_sizes(name: str, millions: int) -> None:
    config = load_config(name)
    assert isinstance(config, DiTRun)
    with torch.device("meta"):
        model = TextDiT(config.model.architecture())
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


def test_vae_size() -> None:
    config = load_config("vae_base")
    assert isinstance(config, VAERun)
    with torch.device("meta"):
        model = TextVAE(config.model.architecture())
    vocabulary = model.embedding.weight.numel() + model.lm_head.weight.numel()
    assert 223e6 <= vocabulary <= 234e6
    assert sum(p.numel() for p in model.parameters()) - vocabulary == pytest.approx(127e6, rel=0.01)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("quickstart")])
@pytest.mark.parametrize("ranks", [1, 8, 16, 24, 32])
def test_big_configs_run_on_whole_nodes_without_changes(name: str, ranks: int) -> None:
    check_ranks(load_config(name), ranks)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.step=3", "unknown key train.step in vae_base.json (with --set); the nearest known key is train.steps"),
        ("lr=1", "nearest known key is optimizer.lr"),
        ("model.latnet_dim=3", "nearest known key is model.latent_dim"),
        ("data.split.knid=x", "nearest known key is data.split.kind"),
        (
            'train.steps="many"',
            'train.steps in vae_base.json (with --set) is "many" (a JSON string); expected a valid int',
        ),
        ("train.steps=many", 'is "many" (a JSON string)'),
        ("train.compile=1", "is 1 (a JSON integer); expected a valid boolean"),
        ("train.steps=0", "expected greater than 0"),
        ("model.width=true", "is true (a JSON boolean)"),
        ("optimizer.lr=NaN", "finite number"),
        ('optimizer.betas=[0.9,"x"]', 'optimizer.betas.1 in vae_base.json (with --set) is "x"'),
        ("train.zero_stage=5", "expected 0, 1, 2 or 3"),
        ("flow={}", "section flow in vae_base.json (with --set) belongs to stage dit"),
        ("stage=ae", 'stage is "ae" in vae_base.json (with --set); expected one of vae, dit'),
        ("train.steps.x=1", "steps is not a section"),
        ("nonsense", "expected key=value"),
        ("model.width=700", "the nearest width is 704"),
        ("data.streams=5", "make rows_per_step a multiple, e.g. 195"),
        ("data.split.kind=context", "stage vae takes truncate or none"),
        ("optimizer.betas=[0.9,1.5]", "each must lie in [0, 1)"),
        ("optimizer.ema_decay=1", "keeps the first weights for ever"),
        ("schedule.warmup_steps=300000", "more than train.steps 200000"),
        ("train.offload_parameters=cpu", "set train.zero_stage=3"),
        ("train.offload_optimizer=nvme", "train.offload_folder is empty"),
        ("train.grace_s=1e9", "make watchdog_s the larger"),
        ("repa.online_teacher=x", "drop one"),
        ("repa.features=null", "set repa.features"),
    ],
)
def test_mistakes_are_named_with_their_remedy(override: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config("vae_base", [override])
    assert expected in str(raised.value)
    assert "pydantic" not in str(raised.value)


def test_bad_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean dit_xl"):
        load_config("dit_x1")
    bad = {"{": "not JSON", "[]": "expected an object", "{}": "stage is missing", '{"stage":"vae"}': "has no default"}
    for text, expected in bad.items():
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            load_config(path)


def test_overrides_are_json_else_strings(tmp_path: Path) -> None:
    config = load_config("dit_b.json", ["train.steps=10000", "data.path=data/x", "deepspeed.zero_optimization.x=true"])
    assert (config.train.steps, config.data.path) == (10000, "data/x")
    assert config.deepspeed == {"zero_optimization": {"x": True}}
    path = tmp_path / "mine.json"
    path.write_text(config.model_copy(update={"about": config.about}).model_dump_json(exclude={"train": {"run"}}))
    assert load_config(path).train.run == "runs/mine"


def test_ranks_must_share_streams_evenly() -> None:
    config = load_config("dit_b", ["data.streams=4", "data.rows_per_step=16", "data.micro_batch_rows=8"])
    for ranks in (1, 2, 4):
        check_ranks(config, ranks)
    with pytest.raises(UserError, match=r"3 ranks cannot share data.streams 4 evenly; possible are 1, 2, 4"):
        check_ranks(config, 3)


@pytest.mark.parametrize(
    ("most", "ranks", "at_most", "expected"),
    [
        (3, 8, None, 3),
        (3, 24, None, 2),
        (6, 24, None, 4),
        (500, 24, None, 8),
        (7, 1, None, 6),
        (6, 1, 5, 4),
        (1, 192, 9, 1),
    ],
)
def test_a_micro_batch_is_the_largest_divisor_within_its_bound(
    most: int, ranks: int, at_most: int | None, expected: int
) -> None:
    config = load_config("dit_xl", [f"data.micro_batch_rows={most}"])
    assert micro_batch_size(config, ranks, at_most) == expected


def test_resume_differences() -> None:
    old = load_config("dit_b")
    new = load_config("dit_b", ["train.zero_stage=3", "optimizer.lr=0.5", "data.workers=5", "train.steps=3000000"])
    found = {d.key: d.harmless for d in resume_differences(old, new)}
    assert found == {"train.zero_stage": True, "optimizer.lr": False, "data.workers": True, "train.steps": True}
    with pytest.raises(UserError, match=r"optimizer.lr was 0.0001, is 0.5. If that is meant, add --allow-change"):
        refuse_changes(resume_differences(old, new), [], "runs/x")
    refuse_changes(resume_differences(old, new), ["optimizer.lr"], "runs/x")
    refuse_changes(resume_differences(old, new), ["optimizer"], "runs/x")
    assert resume_differences(old.model_dump(mode="json"), old) == []


def test_a_cosine_may_not_be_prolonged_unasked() -> None:
    old, new = load_config("vae_base"), load_config("vae_base", ["train.steps=300000"])
    assert [d.harmless for d in resume_differences(old, new)] == [False]


@pytest.mark.parametrize("change", ["train.seed=1", "data.rows_per_step=384", "data.streams=96"])
def test_what_orders_the_data_never_changes(change: str) -> None:
    old, new = load_config("dit_b"), load_config("dit_b", [change])
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=f"{key} was .*, is "):
        refuse_changes(resume_differences(old, new), [key], "runs/x")


def test_every_key_is_described() -> None:
    for kind in (VAERun, DiTRun):
        undescribed = [key for key, _, meaning in describe(kind) if not meaning]
        assert not undescribed


def test_printing_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_module.main(["dit_b", "--set", "train.steps=7000"]) == 0
    assert "train.steps = 7000" in capsys.readouterr().out
    assert config_module.main(["dit_b", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "dit"
    assert config_module.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: no configuration nothing")


def test_times_follow_the_section_flow():
    overrides = ["flow.time_kind=uniform", "flow.time_shift=2", "flow.time_shift_base_dim=16"]
    config = load_config("dit_b", overrides)
    assert isinstance(config, DiTRun)
    times = times_of(config.flow, config.model.latent_dim)  # 64 channels: twice the shift of 16
    assert (times.kind, times.shift) == ("uniform", 4.0)
    plain = times_of(load_config("dit_b").flow, 64)
    assert (plain.kind, plain.std, plain.shift) == ("logit_normal", 1.5, 1.0)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_activation_checkpointing_is_none_all_or_every_nth_block(every):
    stack = Transformer(2, 32, 16, 10_000.0)
    prepare_blocks(
        stack, load_config("dit_b", [f"train.activation_checkpointing={every}", "train.compile=false"]).train
    )
    assert stack.checkpoint_every == every
