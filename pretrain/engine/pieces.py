"""Parameters of which a rank holds its piece alone, from the moment they are made: how a stage is built at ZeRO 3.

A stage makes what it trains within `weights_on(device)`. Elsewhere than at ZeRO 3 that is `with device:`. There (`Pieces`), a module's
parameters are whole, on the device, until the next module begins its own; then they are cut, and this rank keeps its piece. Whoever writes
into them afterwards, as `initialize` does, makes them whole meanwhile (`whole` in modeling/layers.py). So the same code draws the same
numbers in the same order as without ZeRO, and no rank ever holds more than its share and one module's own parameters.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

_taking: "Pieces | None" = None
"""What `weights_on` hands parameters to; None where they stay whole."""


@contextmanager
def weights_on(device: torch.device) -> Iterator[None]:
    """Within, a stage makes the modules that it trains: on `device`, and at ZeRO 3 in pieces. Collective then."""
    with device:
        if _taking is None:
            yield
        else:
            with _taking.from_modules():
                yield


class Pieces:
    """Cuts parameters as DeepSpeed does, one after another.

    Args:
        cut: cuts a list of parameters: rank 0's values, in equal pieces. Collective.
        gathered: gives a context manager within which a list of cut parameters is whole, and whose end cuts them again, with rank 0's
            values. Collective.
    """

    def __init__(
        self,
        cut: Callable[[list[nn.Parameter]], None],
        gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]],
    ) -> None:
        self._cut, self._gathered = cut, gathered
        self._module: nn.Module | None = None
        self._whole: list[nn.Parameter] = []

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Within, parameters made under `weights_on` are these pieces'."""
        global _taking
        _taking = self
        try:
            with _NothingLost():
                yield
        finally:
            _taking = None

    @contextmanager
    def from_modules(self) -> Iterator[None]:
        """Within, parameters are cut when the next module begins with its own, the last ones at the end."""
        hook = register_module_parameter_registration_hook(self._registered)
        try:
            yield
            self._cut_whole()
        finally:
            hook.remove()
            self._module, self._whole = None, []

    def _registered(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if module is not self._module:
            self._cut_whole()
            self._module = module
        if parameter is not None:
            self._whole.append(parameter)

    def _cut_whole(self) -> None:
        new = [p for p in self._whole if not hasattr(p, "whole")]  # a tied one comes twice
        self._whole = []
        for p in new:
            self._cut([p])
            p.whole = partial(self._gathered, [p])  # type: ignore[attr-defined]


class _NothingLost(TorchFunctionMode):
    """Refuses what would write into a cut parameter that is not whole: it has no elements, so nobody would notice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        writes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if writes and hasattr(target, "whole") and not target.numel():
            raise RuntimeError(
                f"{name} on a parameter of shape {list(target.ds_shape)} of which this rank holds a piece (ZeRO 3): write into it"
                " while its module is made, or within `whole` of modeling/layers.py"
            )
        return func(*args, **kwargs)
