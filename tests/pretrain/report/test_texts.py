"""Texts at their milestones, and words that stay."""

from pretrain.report.texts import runs_of, settled_words, spaced


def test_settled_words_are_those_of_the_final_text() -> None:
    words = settled_words("the dog ou home", "the dog ran home")
    assert "".join(word for word, _ in words) == "the dog ou home"
    assert [word for word, settled in words if not settled] == ["ou"]


def test_neighbours_of_one_kind_are_one_piece_and_nothing_is_lost() -> None:
    words = settled_words("a b  x y\nc", "a b c")
    pieces = runs_of(words)
    assert "".join(piece for piece, _ in pieces) == "a b  x y\nc"
    assert [piece.strip() for piece, settled in pieces if not settled] == ["x y"]


def test_of_many_milestones_the_first_and_the_last_are_shown() -> None:
    assert spaced(list(range(100)), 6) == [0, 20, 40, 59, 79, 99]
    assert spaced([1, 2], 6) == [1, 2]
