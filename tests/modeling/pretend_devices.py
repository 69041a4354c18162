"""A machine with several devices, on one CPU: tensors carry the name of a device, and what would meet across devices is an error."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")


def place(tensor: torch.Tensor) -> torch.device:
    """Where a tensor pretends to be."""
    return tensor.__dict__.get("place", CPU)


def put(value: Any, device: torch.device) -> Any:
    """Every tensor of a result, there."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            leaf.__dict__["place"] = device
        return leaf

    return tree_map(one, value)


class PretendDevices(TorchFunctionMode):
    """While it is entered, `device=` and `.to(device)` are obeyed by name."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == torch.Tensor.device.__get__:
            return place(args[0])
        if function is torch.Tensor.cpu:
            return put(function(*args).view_as(args[0]), CPU)
        if function is torch.Tensor.pin_memory:
            return args[0]
        wanted = kwargs.pop("device", None)
        if function is torch.Tensor.to:
            args, wanted = self._target(args, wanted)
            moved = function(*args, **kwargs)
            return put(moved.view_as(moved), torch.device(wanted))
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = {place(tensor) for tensor in tensors if tensor.dim() > 0}
        if len(places) > 1:
            raise RuntimeError(f"{getattr(function, '__name__', function)} of tensors on {sorted(map(str, places))}")
        here = torch.device(wanted) if wanted is not None else next(iter(places), CPU)
        result = function(*args, **kwargs)
        return put(result, here)

    def _target(self, args: Any, wanted: Any) -> tuple[Any, Any]:
        """`.to`'s positional arguments without the device, and the device."""
        wanted = place(args[0]) if wanted is None else wanted
        left = [args[0]]
        for one in args[1:]:
            if isinstance(one, torch.Tensor):
                wanted = place(one)
                left.append(one.dtype)
            elif isinstance(one, torch.dtype | bool):
                left.append(one)
            else:
                wanted = one
        return tuple(left) if len(left) > 1 else (left[0], left[0].dtype), wanted


def split_over(model: nn.Module, device_map: Mapping[str, str]) -> None:
    """As accelerate does it for transformers' `device_map`: what has weights takes its inputs to where they are."""

    def moved(device: torch.device) -> Any:
        def one(leaf: Any) -> Any:
            return leaf.to(device) if hasattr(leaf, "to") else leaf

        return lambda _, args, kwargs: tree_map(one, (args, kwargs), is_leaf=lambda x: hasattr(x, "to"))

    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        longest = max((key for key in device_map if f"{name}.".startswith(f"{key}.")), key=len)
        tensor.__dict__["place"] = torch.device(device_map[longest])
    for module in model.modules():
        places = {place(tensor) for tensor in [*module.parameters(), *module.buffers()]}
        if len(places) == 1:
            module.register_forward_pre_hook(moved(places.pop()), with_kwargs=True)
