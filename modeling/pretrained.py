"""What every exported model is: a PreTrainedModel whose statistics stay in fp32, and that can be pickled where its code is remote.

This file and its neighbours travel in exported folders (`trust_remote_code=True`), so they import only torch, transformers and each other.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import init_hf_modules

from .layers import statistics


class ExportedModel(PreTrainedModel):
    """The base of them; its modules initialise themselves (`layers.initialize`)."""

    _no_split_modules = ["Block", "CategoricalHead"]  # noqa: RUF012 (the base class declares it so)

    def __init__(self, config: PretrainedConfig, **modules: torch.nn.Module):
        super().__init__(config)
        for name, module in modules.items():
            self.add_module(name, module)
        # For from_pretrained, which converts tensor by tensor.
        self._keep_in_fp32_modules_strict = set(statistics(self))
        self.post_init()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any module; but first the process that reads it finds this file, where it is one that transformers copied."""
        if not type(self).__module__.startswith("transformers_modules."):
            return super().__reduce_ex__(protocol)
        in_order = (_Later(init_hf_modules), _Later(object.__new__, type(self)))
        return operator.getitem, (in_order, 1), self.__dict__

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing."""


class _Later:
    """Pickled as a call that is made when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self._call = (function, args)

    def __reduce__(self) -> Any:
        return self._call
