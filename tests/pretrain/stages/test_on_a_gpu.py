"""All stages at their shipped shapes on a pretend GPU: devices do not mix, and the host never waits (pretend_gpu.py)."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import gpu_parts
from data_pipeline.features import quantise
from modeling import attention, losses
from pretrain.config.load import load_config
from pretrain.stages import base
from tests.pretrain.pretend_gpu import CUDA, META, PretendGPU

VOCABULARY = 151_936


class OfTheHost(torch.Generator):
    """A generator, wherever it is asked for."""

    def __new__(cls, _: Any) -> "OfTheHost":
        return super().__new__(cls)

    def __init__(self, _: Any) -> None: ...


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    """A pretend GPU, on which attention is torch's own kernel and the compiler is left out."""
    monkeypatch.setattr(attention, "choose_implementation", lambda *_: "torch_varlen")
    monkeypatch.setattr(losses, "_compiled_loss_of_chunk", lambda: losses.loss_of_chunk)
    # Autograd's hooks see through the pretence: where a recomputed tensor is, they are not to compare.
    metadata = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
    monkeypatch.setattr(torch.utils.checkpoint, "_allowed_determinism_checks_to_fns", metadata)
    monkeypatch.setattr(base.torch, "Generator", OfTheHost)
    mode = PretendGPU()
    with mode:
        mode.is_strict = False
        for levels in set(gpu_parts.CODE_LEVELS):  # tables that are put on the device once
            quantise._byte_values(levels, len(gpu_parts.CODE_LEVELS), CUDA)
        mode.is_strict = True
    yield mode
    quantise._byte_values.cache_clear()  # which keeps what it put there


RECIPES = {
    "vae_base": ("vae_base", []),
    "dit_b": ("dit_b", []),
    "dit_b_categorical": ("dit_b_categorical", ["flow.through_tokens=true"]),
    "ar_b": ("ar_b", ["ar.context_weight=0.5"]),
    "mdlm_b": ("mdlm_b", []),
    "every switch": (
        "dit_b",
        [
            "flow.target=sample", "flow.time_spread=0.5", "flow.token_loss_weight=0.1", "model.self_conditioning=true",
            "model.time_conditioning=adaln_zero", "model.role_embedding=true", "model.qk_norm=true",
            "train.activation_checkpointing=2",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), RECIPES.values(), ids=RECIPES)
def test_a_step_on_a_gpu_mixes_no_devices_and_lets_the_host_go_on(
    gpu: PretendGPU, name: str, settings: list[str]
) -> None:
    config, size = load_config(name, [*settings, "train.compile=false"]), gpu_parts.Size()
    stage = gpu_parts.stage_of(config, META, size).bfloat16()
    batch = gpu_parts.random_batch(config, config.data.micro_batch_rows, VOCABULARY, 0, size)
    with gpu:
        on_device = batch.pin_memory().to("cuda", non_blocking=True)
        of_the_batch = len(gpu.copies)
        counts = {name: max(count, 1) for name, count in stage.token_counts(batch).items()}
        output = stage.train()(on_device, counts)
        output.loss.backward()
    assert {metric.is_meta for metric in output.metrics.values()} == {True}
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in stage.parameters())
    # Layouts are made on the device: what the host sends beside the batch are lengths, not a number for every token.
    assert max(gpu.copies[of_the_batch:]) < 8 * len(batch.tokens_T) / 32


@pytest.mark.parametrize("name", ["vae_base", "dit_b", "dit_b_categorical", "ar_b", "mdlm_b"])
def test_weights_are_drawn_on_the_device_and_never_held_by_the_host(gpu: PretendGPU, name: str) -> None:
    settings = ["train.compile=false"] + ["flow.token_loss_weight=0.1"] * (name == "dit_b")
    gpu.copies.clear()
    with gpu:
        stage = gpu_parts.stage_of(load_config(name, settings), CUDA, gpu_parts.Size())
    assert all(parameter.is_meta for parameter in stage.parameters())
    assert not gpu.copies


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: x.sum().item(), "meta"),
        (lambda x: bool(x.sum() > 0), "meta"),
        (lambda x: x.tolist(), "meta"),
        (lambda x: x.cpu(), "a copy back"),
        (lambda x: x.to("cpu"), "a copy back"),
        (lambda x: x[x > 0], "meta|nonzero"),
        (lambda x: x + torch.ones(4), "cuda and cpu"),
        (lambda x: torch.ones(4).to("cuda", non_blocking=True), "pageable"),
        (lambda x: torch.ones(4).pin_memory().to("cuda"), "blocks"),
    ],
)
def test_the_pretend_gpu_notices(mistake: Any, message: str) -> None:
    with PretendGPU():
        x = torch.zeros(4, device="cuda")
        assert x.is_cuda
        assert x.device.type == "cuda"
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            mistake(x)
