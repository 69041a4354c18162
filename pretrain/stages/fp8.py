"""The blocks' matrices multiplied in fp8, by torchao's linear layers: written against its interface, not measured on a GPU."""

import torch
from torch import nn

from data_pipeline.core.errors import UserError
from modeling.layers import Transformer, hidden

LEAST_CAPABILITY = (8, 9)
"""Ada; Hopper and what came after it have it too."""
MULTIPLE = 16
"""What fp8 products want their dimensions to be divisible by."""


def check_fp8(device: torch.device) -> None:
    """Raises: UserError where `train.precision=fp8` cannot be: without such a GPU, without torchao."""
    instead = "set train.precision=bf16"
    if device.type == "cpu":
        raise UserError(f"train.precision is fp8 on a CPU; only GPUs multiply in fp8: {instead}")
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"train.precision is fp8 on {name} (capability {found}); fp8 begins with {LEAST_CAPABILITY}: {instead}"
        )
    try:
        import torchao.float8  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"train.precision is fp8, which torchao computes, and torchao cannot be imported ({error}): pip install torchao, or {instead}"
        ) from None


def multiply_in_fp8(stage: nn.Module) -> None:
    """In every Transformer below `stage`, torchao's layers take the place of the maps between hidden states; all else stays in bf16.

    They hold the same parameters by the same names, so optimizers, checkpoints and exports see no difference. What a product reads is
    scaled as a whole and rounded to e4m3, gradients to e5m2 (torchao's default recipe).
    """
    from torchao.float8 import convert_to_float8_training

    for module in stage.modules():
        if isinstance(module, Transformer):
            counts = {name: one.matrices for name, one in module.named_modules() if _is_hidden(one)}
            convert_to_float8_training(module, module_filter_fn=lambda linear, _: _is_hidden(linear))
            for name, count in counts.items():
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                hidden(linear, count)  # type: ignore[arg-type]  # which Muon asks for


def _is_hidden(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or getattr(module, "matrices", None) is None:
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
