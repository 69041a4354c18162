"""Texts longer than a model's window, piece by piece, each with the latest text before it: for likelihoods and for continuations."""

from collections.abc import Callable, Iterator, Sequence

from modeling.beyond_window import block_sizes, latest


def pieces(context: Sequence[int], target: Sequence[int], window: int | None) -> Iterator[tuple[list[int], list[int]]]:
    """The target in the blocks of an exported TextLDM (`block_sizes`) with the true tokens before each, together at most `window` long
    (None: no limit)."""
    text, start = [*context, *target], len(context)
    for size in block_sizes(len(context), len(target), len(text) if window is None else window):
        before = latest(text[:start], size, len(text) if window is None else window)
        yield before, text[start : start + size]
        start += size


Continue = Callable[[list[int], list[list[int]], list[int], int], list[list[int]]]
"""Places of the prompts that go on, their contexts, their numbers of new tokens, and the number of the round -> the new tokens of each."""


def continued(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], window: int | None, one_round: Continue
) -> list[list[int]]:
    """`lengths` new tokens for each prompt, in rounds: the prompts whose window is full go on with their latest tokens as context.

    A prompt for which a round gives nothing ends there.
    """
    texts, missing = [list(prompt) for prompt in prompts], list(lengths)
    number = 0
    while places := [i for i, n in enumerate(missing) if n > 0]:
        asked = [next(pieces(texts[i], [0] * missing[i], window)) for i in places]
        found = one_round(places, [context for context, _ in asked], [len(piece) for _, piece in asked], number)
        for i, tokens in zip(places, found, strict=True):
            texts[i] += tokens
            missing[i] = missing[i] - len(tokens) if tokens else 0
        number += 1
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]
