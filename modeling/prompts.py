"""What callers of the exported model may give: token ids of texts in any of their usual forms, and numbers for all prompts or for each.

Shape letters: T tokens of a text.
"""

from collections.abc import Sequence
from typing import Any

import torch


def texts_of(given: Any) -> list[torch.Tensor]:
    """Int64 token ids [T] of each text: of several, or of one, which is what a flat list or tensor of numbers holds. Raises: ValueError."""
    texts = list(given)
    return [_ids(texts)] if texts and not any(map(several, texts)) else [_ids(one) for one in texts]


def several(given: Any) -> bool:
    """Whether it is a sequence or array of values rather than one."""
    return isinstance(given, Sequence) or bool(getattr(given, "ndim", 0))


def each(name: str, given: int | Sequence[int], num: int) -> list[int]:
    """A number for each of `num` prompts, of one for all or one for each. Raises: ValueError."""
    numbers = [int(one) for one in given] if several(given) else [int(given)] * num  # type: ignore[union-attr, arg-type]
    if len(numbers) != num:
        raise ValueError(f"{name} has {len(numbers)} values; expected one for all, or one for each of {num} prompts")
    return numbers


def end_of(ids_T: torch.Tensor, ends: Sequence[int]) -> int | None:
    """The place of the first token that ends a text, None when there is none."""
    places = torch.isin(ids_T, ids_T.new_tensor(ends)).nonzero()
    return int(places[0]) if len(places) else None


def _ids(ids: Any) -> torch.Tensor:
    try:
        ids_T = torch.as_tensor(ids).cpu()
    except (TypeError, ValueError, RuntimeError):
        ids_T = None
    if ids_T is None or ids_T.dim() != 1 or (len(ids_T) and (ids_T.is_floating_point() or ids_T.dtype == torch.bool)):
        shown = f"a {ids_T.dtype} tensor of shape {list(ids_T.shape)}" if ids_T is not None else repr(ids)[:60]
        raise ValueError(
            f"a text is given as {shown}; expected its token ids: a list or 1-D tensor of integers, or a list of such"
        )
    return ids_T.long()
