"""train.precision=fp8: which layers torchao takes over, and that nothing else sees a difference. Nothing here says how fast it is."""

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from data_pipeline.core.errors import UserError
from modeling.attention import Segments
from modeling.text_dit import TextDiT, TextDiTConfig
from pretrain.config.load import load_config
from pretrain.engine.muon import hidden_matrices
from pretrain.stages.fp8 import check_fp8, multiply_in_fp8

HIDDEN = {"attention.qkv", "attention.out", "mlp_in", "mlp_out"}


@pytest.fixture
def float8(monkeypatch: pytest.MonkeyPatch) -> type[nn.Linear]:
    """torchao's layer where it is installed, else one that replaces linears as it does (0.18), without their further attributes."""
    try:
        from torchao.float8.float8_linear import Float8Linear
    except ImportError:
        pass
    else:
        return Float8Linear

    class Float8Linear(nn.Linear):  # type: ignore[no-redef]
        pass

    def convert(module: nn.Module, *, module_filter_fn):  # type: ignore[no-untyped-def]
        for name, linear in list(module.named_modules()):
            if isinstance(linear, nn.Linear) and module_filter_fn(linear, name):
                with torch.device("meta"):
                    new = Float8Linear(linear.in_features, linear.out_features, bias=False)
                new.weight, new.bias = linear.weight, linear.bias
                module.set_submodule(name, new)
        return module

    package, inner = ModuleType("torchao"), ModuleType("torchao.float8")
    inner.convert_to_float8_training = convert  # type: ignore[attr-defined]
    package.float8 = inner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.float8", inner)
    return Float8Linear


def test_the_blocks_matrices_alone_are_taken_over_with_their_parameters(float8: type[nn.Linear]) -> None:
    with torch.device("meta"):
        model = TextDiT(TextDiTConfig(latent_dim=16, width=64, num_layers=2, head_dim=32)).bfloat16()
    parameters, matrices = dict(model.named_parameters()), hidden_matrices(model)
    multiply_in_fp8(model)
    taken = {name for name, module in model.named_modules() if isinstance(module, float8)}
    assert taken == {f"transformer.blocks.{block}.{name}" for block in range(2) for name in HIDDEN}
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert hidden_matrices(model) == matrices
    hidden_TD = torch.zeros(48, 64, device="meta", dtype=torch.bfloat16)
    model.transformer(hidden_TD, Segments.from_lengths([32, 16], "meta")).float().square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())


def test_where_it_cannot_be_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"fp8 on a CPU; only GPUs multiply in fp8: set train.precision=bf16"):
        check_fp8(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(UserError, match=r"fp8 on NVIDIA A100 \(capability \(8, 0\)\); fp8 begins with"):
        check_fp8(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        UserError, match=r"torchao cannot be imported .*: pip install torchao, or set train.precision=bf16"
    ):
        check_fp8(torch.device("cuda", 0))


def test_everything_else_computes_in_bf16() -> None:
    train = load_config("dit_b", ["train.precision=fp8"]).train
    assert train.computes_in(torch.device("cuda", 0)) == "bf16"
    assert load_config("dit_b", []).train.precision == "bf16"  # off, where it is not asked for
    with pytest.raises(UserError, match=r"train.precision is fp8 and train.zero_stage 0"):
        load_config("dit_b", ["train.precision=fp8", "train.zero_stage=0"])
