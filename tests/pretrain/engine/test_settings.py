"""What the engine is told: which settings are refused, and the DeepSpeed dictionary that the rest becomes."""

import pytest
import torch

from data_pipeline.core.errors import UserError
from pretrain.engine.settings import EngineSettings, Sharding, deepspeed_config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 4}, "0, 1, 2 or 3"),
        ({"zero_stage": 0, "precision": "bf16"}, "accumulate gradients in bf16: set train.zero_stage=1, 2 or 3"),
        ({"zero_stage": 0, "offload_optimizer": "cpu"}, "set train.zero_stage to 1, 2 or 3"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "set train.zero_stage=3"),
        ({"zero_stage": 3, "offload_parameters": "nvme"}, "train.offload_folder is empty"),
        ({"offload_optimizer": "nvme"}, "train.offload_folder is empty"),
    ],
)
@pytest.mark.parametrize("kind", [Sharding, EngineSettings])
def test_what_deepspeed_cannot_do_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", None])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_auto_is_bf16_where_the_cpu_multiplies_it_and_deepspeed_sums_in_fp32(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, stage: int
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True} if flag else {})
    found = Sharding(precision="auto", zero_stage=stage).computes_in(torch.device("cpu"))
    assert found == ("bf16" if flag and stage else "fp32")


def test_the_engines_settings_are_the_configurations_and_what_was_decided():
    sharding = Sharding(zero_stage=3, offload_optimizer="nvme", offload_parameters="cpu", offload_folder="x")
    settings = EngineSettings.of(sharding, precision="bf16", accumulation_steps=3)
    assert settings.model_dump(include=set(Sharding.model_fields)) == sharding.model_dump() | {"precision": "bf16"}
    assert (settings.accumulation_steps, settings.overrides) == (3, {})


def test_overrides_are_merged_deeply():
    config = deepspeed_config(
        EngineSettings(zero_stage=2, overrides={"zero_optimization": {"reduce_bucket_size": 7}}), 2
    )
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"zero_optimisation": {}}, "unknown"),
        ({"gradient_clipping": 1.0}, "optimizer.grad_clip"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "train.precision"),
        ({"zero_optimization": {"stage": 3}}, "train.zero_stage 1"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            "wrong gradients.*train.offload_optimizer=nvme",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "wrong gradients.*train.offload_parameters=nvme",
        ),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization is 2; expected an object"),
        ({"zero_optimization": {"offload_param": None}}, "deepspeed.zero_optimization.offload_param is null"),
        ({"aio": [1]}, r"deepspeed.aio is \[1\]"),
    ],
)
def test_overrides_that_would_be_ignored_or_contradict_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        deepspeed_config(EngineSettings(zero_stage=1, overrides=overrides), 2)
