"""Every shipped configuration's own combination of switches, in small, through pretrain/train.py, beside its plainest form.

All keys but sizes, paths and how often something happens are those of the file: a new configuration is covered by being there. What is
the same in small is trained once. A CPU stands in for the GPU as far as it can: blocks are traced by the compiler forward and backward,
but run without its kernels; torch's fused AdamW is forced; FlashAttention, fp8, NCCL and pinned memory have no part in it.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.gpu_parts import FEATURE_DIM, random_codec
from data_pipeline.features.codec_choice import Fidelity
from data_pipeline.features.job import CodecOptions, FeatureJob
from data_pipeline.format.manifest import Manifest
from modeling.layers import Block
from pretrain import train
from pretrain.config.load import load_config
from pretrain.engine.adamw import AdamW
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import tiny_run
from tests.pretrain.conftest import Trained

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VOCABULARY, STEPS = 151_936, 3
SMALL = {
    "model": {"width": 32, "num_layers": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "head_dim": 16, "latent_dim": 4},
    "data": {"streams": 4, "rows_per_step": 8, "micro_batch_rows": 2},
    "flow": {"statistics_rows": 8},
    "optimizer": {"lr": 0.01, "matrix_lr": 0.01},
    "schedule": {"warmup_steps": 1},
    "kl": {"warmup_steps": 1},
    "train": {
        "steps": STEPS, "checkpoint_every": STEPS, "keep_every": 0, "eval_every": STEPS, "eval_rows": 2, "log_every": 1,
        "watchdog_s": 600, "timeout_s": 700,
    },
    "telemetry": {"wandb": False},
}  # fmt: skip
PLAIN = {
    "eval_every": 0,
    "compile": False,
    "precision": "fp32",
    "zero_stage": 1,
    "activation_checkpointing": 0,
    "spike_sigmas": 0.0,
}
UNLIKE = {"about", "diagnose"}
"""Sections that training does not read."""
BF16_ERROR = 0.01
"""Of a loss, over its value, three large steps on; 0.003 was the most that was seen."""


class Teacher(SimpleNamespace):
    """Features of a teacher as wide as Qwen3-1.7B, without one."""

    def features(self, tokens_T: torch.Tensor, *_: object) -> torch.Tensor:
        return (tokens_T[:, None] * torch.linspace(0.1, 1.0, FEATURE_DIM)).sin()

    def describe(self) -> dict:
        return {"name": "sines"}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tokens of Qwen3's vocabulary, and in `features` a cache of 2,048 features a token."""
    data = tiny_run.write_data(tmp_path_factory.mktemp("vocabulary") / "data", vocabulary=VOCABULARY)
    teacher: Any = Teacher(device=torch.device("cpu"))
    job = FeatureJob(str(data), Manifest.load(data), data / "features", teacher, CodecOptions())
    codec = random_codec(torch.device("cpu"))
    job.keep(codec, Fidelity(codec.rank, "mixed", 2, 0.9, 0.8, 0.7, 0.0, codec.bytes_per_token, 0.01, codec.own_bytes))
    job.run(codec, 0, 1)
    return data


class Places(SimpleNamespace):
    """Where what a configuration reads is to be found here, and the runs so far."""

    def settings(self, name: str, run: Path) -> list[str]:
        """`--set` values that make a shipped configuration small and put it here."""
        shipped = load_config(name, []).model_dump()
        values = {section: dict(keys) for section, keys in SMALL.items()}
        values["train"]["run"] = str(run)
        values["data"]["path"] = str(self.data)
        if shipped["stage"] == "vae":
            values["data"]["path"] = str(self.vocabulary)
            values["repa"] = {"features": str(self.vocabulary / "features")}
        elif shipped["stage"] in ("dit", "distill"):
            values["model"]["vae"] = str(self.vae)
        else:
            values["model"]["vocab_size"] = 0
        if shipped["data"]["split"]["kind"] == "data":
            values["data"]["path"] = str(self.pairs)
        else:
            values["data"]["split.min_tokens"] = 2
        if earlier := shipped["train"]["init_from"]:
            values["train"]["init_from"] = str(self.trained(Path(earlier).name))
        if shipped["stage"] == "distill":
            base = json.loads((CONFIGS / f"{name}.json").read_text())["base"]
            values["distill"] = {"teacher": str(self.trained(base))}
        known = {section: keys for section, keys in values.items() if section in shipped}
        return [
            f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"
            for section, keys in known.items()
            for key, value in keys.items()
            if key.split(".")[0] in shipped[section]
        ]

    def trained(self, name: str, plain: bool = False) -> Path:
        """The run of a configuration's combination, or of what it combines in its plainest form; made once."""
        settings = self.settings(name, self.folder / "run")
        if plain:
            settings += [f"train.{key}={json.dumps(value)}" for key, value in PLAIN.items()] + [
                "data.micro_batch_rows=8"
            ]
        values = load_config(name, settings).model_dump(mode="json")
        key = json.dumps({section: value for section, value in values.items() if section not in UNLIKE}, sort_keys=True)
        if key not in self.runs:
            run = self.folder / f"{name}{'-plain' * plain}"
            overrides = [word for one in [*settings, f"train.run={run}"] for word in ("--set", one)]
            assert train.main(["--config", name, *overrides]) == 0
            self.runs[key] = run
        return self.runs[key]


@pytest.fixture(scope="module")
def places(trained: Trained, pairs: Path, vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(
        data=trained.data, vae=trained.vae, pairs=pairs, vocabulary=vocabulary, runs={},
        folder=tmp_path_factory.mktemp("combinations"),
    )  # fmt: skip


def losses(run: Path) -> list[float]:
    """Of every step."""
    return [line["loss"] for line in read_metrics(run)]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_a_shipped_combination_trains_as_its_plainest_form(
    name: str, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: set[nn.Module] = set()
    fused: list[AdamW] = []
    compile_block: Callable[..., None] = nn.Module.compile

    def traced(self: nn.Module, **options: Any) -> None:
        assert isinstance(self, Block)
        compiled.add(self)
        compile_block(self, backend="aot_eager", **options)

    def update(self: AdamW, weight: torch.Tensor, grad: torch.Tensor, states: dict, group: dict) -> None:
        fused.append(self)
        self.fused(weight, grad, states["exp_avg"], states["exp_avg_sq"], group)

    monkeypatch.setattr(nn.Module, "compile", traced)
    torch._dynamo.reset()
    plain = losses(places.trained(name, plain=True))
    compiled.clear()
    monkeypatch.setattr(AdamW, "update", update)
    before = len(places.runs)
    run = places.trained(name)
    config = load_config(name, places.settings(name, run))
    if len(places.runs) > before:
        assert bool(compiled) == config.train.compile
        assert fused or config.optimizer.kind != "adamw"
    is_bf16 = config.train.computes_in(torch.device("cpu")) == "bf16"
    found = losses(run)
    assert len(found) == STEPS
    assert found == pytest.approx(plain, rel=BF16_ERROR if is_bf16 else 1e-4)
    assert any(value != other for value, other in zip(found, plain)) == (
        config.train.precision == "bf16" or found != plain
    )
    evaluated = read_metrics(run, "eval")[-1]
    assert all(math.isfinite(value) for key, value in evaluated.items() if key.startswith("eval/"))
