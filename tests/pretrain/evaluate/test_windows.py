"""Long texts in pieces: every target token once, after the true tokens before it."""

import pytest

from pretrain.evaluate.windows import continued, pieces


@pytest.mark.parametrize(
    ("context", "target", "window"), [(0, 7, 4), (3, 4, 7), (3, 5, 7), (20, 1, 8), (2, 100, 9), (5, 6, None), (4, 9, 1)]
)
def test_pieces_hold_each_target_token_once_behind_what_stood_before_it(
    context: int, target: int, window: int | None
) -> None:
    text = list(range(context + target))
    found = list(pieces(text[:context], text[context:], window))
    assert [token for _, piece in found for token in piece] == text[context:]
    for before, piece in found:
        assert before == text[piece[0] - len(before) : piece[0]]
        assert window is None or len(before) + len(piece) <= window
    if window is not None and context + target > window:
        # As much as there is before each, up to the rest of the window.
        assert all(len(before) == min(piece[0], window - len(piece)) for before, piece in found)
    else:
        assert len(found) == 1


def test_continuations_have_their_lengths_and_go_on_from_the_latest_tokens() -> None:
    asked = []

    def one_round(places: list[int], contexts: list[list[int]], new: list[int], number: int) -> list[list[int]]:
        asked.append((places, [len(context) + n for context, n in zip(contexts, new)], number))
        return [[(context[-1] if context else 0) + 1 + k for k in range(n)] for context, n in zip(contexts, new)]

    prompts, lengths = [[1, 2, 3], [], [5] * 30, [7]], [20, 3, 2, 0]
    found = continued(prompts, lengths, 8, one_round)
    assert [len(new) for new in found] == lengths
    assert found[0] == list(range(4, 24))  # each block begins with what the one before ended with
    assert found[1:] == [[1, 2, 3], [6, 7], []]
    assert all(length <= 8 for _, lengths_, _ in asked for length in lengths_)
    assert asked[0][0] == [0, 1, 2]


def test_a_prompt_for_which_nothing_comes_ends() -> None:
    assert continued([[1], [2]], [4, 4], None, lambda places, *_: [[9] if i else [] for i in places]) == [[], [9] * 4]
