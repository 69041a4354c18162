"""Configurations: every shipped one holds, mistakes are named with their remedy."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.core.configuration import CONFIG_FOLDER
from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import flatten, keys
from modeling.layers import Transformer
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from pretrain.config.load import load_config
from pretrain.stages.blocks import prepare_blocks
from pretrain.stages.dit import times_of
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.vae_config import VAERun

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
    assert ladder | {f"{name}_categorical" for name in ladder if name.startswith("dit_")} <= set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "width"), [("dit_b", 768), ("dit_l", 1024), ("dit_xl", 1280), ("dit_2b", 2560), ("dit_7b", 4096)]
)
def test_a_categorical_config_has_the_other_head_and_nothing_else(name: str, width: int) -> None:
    plain, config = load_config(name), load_config(f"{name}_categorical")
    assert isinstance(config, DiTRun)
    assert isinstance(plain, DiTRun)
    unlike = {"train": {"run"}, "about": True, "model": {"head"}, "flow": {"token_loss_weight"}}
    assert config.model_dump(exclude=unlike) == plain.model_dump(exclude=unlike)
    sizes = []
    for shape in (plain.model.architecture(), config.model.architecture()):
        shape.vocab_size = 151_936
        with torch.device("meta"):
            sizes.append(sum(p.numel() for p in TextDiT(shape).parameters()))
    # Logits of every token, and the estimate of z beside the latents in the input.
    assert sizes[1] - sizes[0] == 151_936 * width + 64 * width


@pytest.mark.parametrize("name", ["dit_b", "dit_l", "dit_xl"])
def test_heads_of_128_are_the_only_difference_and_no_weight_more(name: str) -> None:
    plain, config = load_config(name), load_config(f"{name}_hd128")
    assert isinstance(config, DiTRun)
    assert isinstance(plain, DiTRun)
    unlike = {"train": {"run"}, "about": True, "model": {"head_dim"}}
    assert config.model_dump(exclude=unlike) == plain.model_dump(exclude=unlike)
    assert config.model.head_dim == 128
    shapes = []
    for one in (plain, config):
        with torch.device("meta"):
            shapes.append([p.shape for p in TextDiT(one.model.architecture()).parameters()])
    assert shapes[0] == shapes[1]


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
@pytest.mark.parametrize("ranks", [1, 8, 16, 24, 32, 40, 128, 256, 384, 512, 1024])
def test_big_configs_run_on_any_number_of_nodes_without_changes(name: str, ranks: int) -> None:
    rows = 96 if name == "sft" else 384
    assert load_config(name).data.rank_rows(ranks) == -(-rows // ranks)


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
        (
            "flow={}",
            "unknown key flow in vae_base.json (with --set); section flow belongs to stage dit or distill: drop it, or change stage",
        ),
        ("stage=ae", 'stage is "ae" in vae_base.json (with --set); expected one of vae, dit'),
        ("train.steps.x=1", "steps is not a section"),
        ("nonsense", "expected key=value"),
        ("model.width=700", "the nearest width is 704"),
        ("data.streams=5", "make rows_per_step a multiple, e.g. 385"),
        ("data.split.kind=context", "stage vae takes truncate or none"),
        ("optimizer.betas=[0.9,1.5]", "each must lie in [0, 1)"),
        ("optimizer.ema_decay=1", "keeps the first weights for ever"),
        ("schedule.warmup_steps=300000", "more than train.steps 200000"),
        ("train.offload_parameters=cpu", "set train.zero_stage=3"),
        ("train.offload_optimizer=nvme", "train.offload_folder is empty"),
        ("train.zero_stage=0", "train.precision is bf16 and train.zero_stage 0"),
        ("deepspeed.fp16.enabled=true", "deepspeed.fp16 is set elsewhere in the configuration: use train.precision"),
        ("deepspeed.zero_optimization.stage=3", "train.zero_stage 1: set the latter only"),
        (
            "learning_rate=1e-4",
            "unknown key learning_rate in vae_base.json (with --set); here that is optimizer.lr (Peak",
        ),
        ("model.num_layers=3", "here that is model.num_encoder_layers (blocks) or model.num_decoder_layers (blocks)"),
        ("train.batch_size=3", "here that is data.rows_per_step (Rows of one optimizer step over all ranks"),
        ("bf16=true", 'here that is train.precision ("fp32", "bf16", "fp8", "auto")'),
        ("train.dropout=0.1", "unknown key train.dropout in vae_base.json (with --set); no known key is like it"),
        ("train.compile=True", "expected a valid boolean: write true"),
        ("train.steps=1e3", "expected a valid integer: write 1000"),
        ("train.grace_s=1e9", "make watchdog_s the larger"),
        ("train.timeout_s=1859", "set train.timeout_s to 1860 or more"),
        ("train.watchdog_s=1801", "set train.timeout_s to 1861 or more"),
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
    for text, expected in {"{": "not JSON", "{}": "stage is missing", '{"stage":"vae"}': "has no default"}.items():
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


def test_a_run_is_not_its_bases(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"base": "quickstart_dit", "train": {"steps": 3000}}))
    base, mine = load_config("quickstart_dit"), load_config(path)
    assert (mine.train.run, mine.about.purpose, mine.train.steps) == ("runs/mine", "", 3000)
    unlike = {"train": {"run", "steps"}, "about": True}
    assert mine.model_dump(exclude=unlike) == base.model_dump(exclude=unlike)


def test_another_optimizer_leaves_behind_what_its_bases_alone_knows(tmp_path: Path) -> None:
    assert load_config("quickstart_dit").optimizer.kind == "muon"
    adamw = load_config("quickstart_dit", ["optimizer.kind=adamw"]).optimizer
    assert (adamw.kind, hasattr(adamw, "matrix_lr")) == ("adamw", False)
    assert adamw.lr == load_config("quickstart_dit").optimizer.lr  # what both know is inherited
    path, above = tmp_path / "mine.json", tmp_path / "again.json"
    path.write_text(json.dumps({"base": "quickstart_dit", "optimizer": {"kind": "adamw"}}))
    above.write_text(json.dumps({"base": "mine", "optimizer": {"kind": "muon", "momentum": 0.9}}))
    assert load_config(path).optimizer == adamw
    assert load_config(above).optimizer.matrix_lr == 0.02  # muon's own default
    for own in ({"kind": "adamw", "matrix_lr": 0.1}, {"kind": "adamw", "matrix_rl": 0.1}):
        path.write_text(json.dumps({"base": "quickstart_dit", "optimizer": own}))
        with pytest.raises(UserError, match=r"unknown key optimizer\.matrix_"):
            load_config(path)
    with pytest.raises(UserError, match=r"unknown key optimizer\.matrix_lr"):
        load_config("quickstart_dit", ["optimizer.kind=adamw", "optimizer.matrix_lr=0.1"])
    with pytest.raises(UserError, match=r'optimizer\.kind in .* is "sgd"'):
        load_config("quickstart_dit", ["optimizer.kind=sgd"])


@pytest.mark.parametrize(("name", "most"), [("dit_l", 6), ("dit_xl", 7), ("dit_2b", 12), ("dit_7b", 14)])
def test_the_ladder_is_dit_b_and_few_differences(name: str, most: int) -> None:
    written = json.loads((CONFIG_FOLDER / f"{name}.json").read_text())
    assert written["base"] == "dit_b"
    assert len(dict(flatten(written))) - 1 <= most
    base, config = (dict(flatten(load_config(n).model_dump(mode="json"))) for n in ("dit_b", name))
    differing = {key for key in config if config[key] != base[key]}
    assert differing == dict(flatten(written)).keys() - {"base"} | {"train.run"}


def test_every_key_is_described() -> None:
    for kind in (VAERun, DiTRun):
        undescribed = [key.name for key in keys(kind) if not key.is_section and not key.meaning]
        assert not undescribed


def test_times_follow_the_section_flow():
    config = load_config("dit_b", ["flow.time_kind=uniform", "flow.time_shift=2"])
    assert isinstance(config, DiTRun)
    times = times_of(config.flow)
    assert (times.kind, times.shift) == ("uniform", 2.0)
    plain = times_of(load_config("dit_b").flow)
    assert (plain.kind, plain.std, plain.shift) == ("logit_normal", 1.5, 1.0)


@pytest.mark.parametrize("every", [0, 1, 3])
def test_activation_checkpointing_is_none_all_or_every_nth_block(every):
    stack = Transformer(2, 32, 16, 10_000.0)
    prepare_blocks(
        stack, load_config("dit_b", [f"train.activation_checkpointing={every}", "train.compile=false"]).train
    )
    assert stack.checkpoint_every == every
