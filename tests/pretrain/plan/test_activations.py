"""What the meta device says of memory is what the allocator sees."""

import pytest
import torch

from benchmarks.plan import MODELS, VOCABULARY, activation_ratio, outline
from modeling import layers
from pretrain.config.load import load_config
from pretrain.plan.activations import trace
from pretrain.plan.estimate import outline_of
from pretrain.stages.outline import Windows


@pytest.mark.parametrize(
    "name", [pytest.param("dit, recomputed", marks=pytest.mark.slow), "vae", "ar", "mdlm, every second"]
)
def test_planned_activations_are_those_that_the_allocator_records(name: str) -> None:
    config, overrides, every = MODELS[name]
    overrides = tuple(o.replace("192", "128") for o in overrides)
    assert activation_ratio(config, overrides, every, Windows([60] * 3)) == pytest.approx(1, abs=0.1)


def test_recomputation_keeps_less_and_kernels_are_put_back() -> None:
    model = outline(*MODELS["ar"][:2], "meta")
    attention = layers.varlen_attention
    kept, recomputed = (trace(model, Windows([64] * 4), True, every) for every in (0, 1))
    assert recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.moved_bytes > kept.moved_bytes
    assert layers.varlen_attention is attention


@pytest.mark.parametrize("name", ["vae_base", "dit_b", "dit_b_categorical", "ar_b", "mdlm_b"])
def test_an_outline_is_its_stage(name: str) -> None:
    """As many parameters as the configuration's model, and FLOPs that grow with tokens and windows."""
    config = load_config(name)
    found = outline_of(config, torch.device("meta"), VOCABULARY)
    assert all(p.is_meta for p in found.trained.parameters())
    short, long = found.flops(Windows([64] * 8)), found.flops(Windows([512]))
    assert 0 < short < long < 1.2 * short * 8
