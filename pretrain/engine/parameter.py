"""A parameter as checkpoints know it. Without torch: supervision and command lines look into checkpoints, too."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """What the checkpoint says of a parameter: full shape, whether weight decay acts on it, names of its states."""

    shape: tuple[int, ...]
    decays: bool
    states: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Elements of the full parameter."""
        return math.prod(self.shape)
