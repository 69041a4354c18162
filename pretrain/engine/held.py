"""The range that a rank holds of a parameter: what partitions are made of, and matrices and checkpoints are put together from."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """Elements [start, start + numel) of parameter `name` are [offset, offset + numel) of flat tensor number `flat`."""

    name: str
    start: int
    numel: int
    flat: int
    offset: int
