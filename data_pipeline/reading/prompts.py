"""Contexts with their true continuations, out of batches that are split into context and target."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch


@dataclass(frozen=True)
class Prompt:
    """Context (may be empty) and true target of a window, int64 tokens on the CPU."""

    context_T: Tensor
    target_T: Tensor


def prompts_of(batches: Iterable[Batch], max_tokens: int) -> list[Prompt]:
    """The first windows with a context, until together they hold `max_tokens`; at least one, if there is any."""
    prompts: list[Prompt] = []
    tokens = 0
    for batch in batches:
        pieces = batch.tokens_T.cpu().split(batch.segment_lengths)
        roles = batch.segment_roles
        for i in range(len(pieces) - 1):
            same_window = batch.segment_windows[i] == batch.segment_windows[i + 1]
            if roles[i] != PREFIX or roles[i + 1] != SUFFIX or not same_window:
                continue
            length = len(pieces[i]) + len(pieces[i + 1])
            if prompts and tokens + length > max_tokens:
                return prompts
            prompts.append(Prompt(pieces[i], pieces[i + 1]))
            tokens += length
    return prompts
