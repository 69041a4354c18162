"""Texts longer than a model's window, piece by piece, each with the latest text before it: for likelihoods and for continuations."""

from collections.abc import Callable, Iterator, Sequence


def pieces(context: Sequence[int], target: Sequence[int], window: int | None) -> Iterator[tuple[list[int], list[int]]]:
    """The target in pieces with the true tokens before each, together at most `window` long (None: no limit).

    A target that fits behind its context is one piece; otherwise pieces are half a window, so that each has at least as much before it
    as there is, up to the other half.
    """
    context, target = list(context), list(target)
    if window is None or len(context) + len(target) <= window:
        yield context, target
        return
    size = max(1, window // 2)
    for start in range(0, len(target), size):
        piece = target[start : start + size]
        before = [*context, *target[:start]]
        room = window - len(piece)
        yield before[len(before) - min(room, len(before)) :], piece


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
