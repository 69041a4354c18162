"""A GPU on a machine without one: its tensors are those of the meta device, and say that they are on "cuda".

While `PretendGPU` is entered, what is asked for on "cuda" is made on the meta device, which has shapes and no values. So nothing
can be read back: `.item()`, `.tolist()`, `bool()`, `nonzero()`, a mask as an index and all else for which a host would wait for the
device fail here; a copy from pageable memory does as well. And what would meet across devices is an error, as on a GPU.
"""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA, META = torch.device("cuda", 0), torch.device("meta")
DEVICE, IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class PretendGPU(TorchFunctionMode):
    """See above. `copies`: bytes of each copy to the device; `is_strict`: none of them may block."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[int] = []
        self.is_strict = True
        self._pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []  # so that no address is met twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == DEVICE:
            found = function(*args)
            return CUDA if found == META else found
        if function == IS_CUDA:
            return args[0].is_meta
        if function is torch.Tensor.pin_memory:
            self._pinned.add(args[0].data_ptr())
            self._kept.append(args[0])
            return args[0]
        if function is torch.Tensor.cpu or (function is torch.Tensor.to and _is_to_the_host(args, kwargs)):
            raise RuntimeError("the host waits for the device: a copy back")
        if function is torch.Tensor.to or function is torch.Tensor.cuda:
            self._check_copy(args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = {tensor.is_meta for tensor in tensors if tensor.dim() > 0}
        if len(on_device) > 1 and function is not torch.Tensor.to:
            raise RuntimeError(f"{getattr(function, '__name__', function)} of tensors on cuda and cpu")
        args = tuple(META if _is_cuda(one) else one for one in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = META
            kwargs.pop("generator", None)  # one of the device
        return function(*args, **kwargs)

    def _check_copy(self, args: Any, kwargs: dict[str, Any]) -> None:
        targets = [*args[1:], kwargs.get("device")]
        if args[0].is_meta or not any(_is_cuda(one) for one in targets):
            return
        if (
            self.is_strict
            and args[0].dim()
            and (args[0].data_ptr() not in self._pinned or not kwargs.get("non_blocking"))
        ):
            raise RuntimeError("the host waits for the device: a copy from pageable memory, or one that blocks")
        self.copies.append(args[0].nbytes)


def _is_cuda(one: object) -> bool:
    if isinstance(one, str):
        return one.startswith("cuda")
    return isinstance(one, torch.device) and one.type == "cuda"


def _is_to_the_host(args: Any, kwargs: dict[str, Any]) -> bool:
    if not args[0].is_meta:
        return False
    targets = [one for one in [*args[1:], kwargs.get("device")] if isinstance(one, str | torch.device)]
    return any(str(one).startswith("cpu") for one in targets) or any(
        isinstance(one, torch.Tensor) and not one.is_meta for one in args[1:]
    )
