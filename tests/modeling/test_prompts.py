"""Whatever form texts and numbers are given in, they mean the same."""

import numpy as np
import pytest
import torch

from modeling.prompts import each, end_of, texts_of


@pytest.mark.parametrize(
    "given", [[3, 4], (3, 4), torch.tensor([3, 4]), np.array([3, 4]), [[3, 4]], torch.tensor([[3, 4]])], ids=repr
)
def test_one_text_in_any_form(given: object) -> None:
    (ids_T,) = texts_of(given)
    assert (ids_T.tolist(), ids_T.dtype) == ([3, 4], torch.int64)


def test_several_texts_and_empty_ones() -> None:
    assert [ids_T.tolist() for ids_T in texts_of([[1], [], torch.tensor([2, 3])])] == [[1], [], [2, 3]]
    assert texts_of([]) == []
    with pytest.raises(ValueError, match="expected its token ids"):
        texts_of([[1], 2])


@pytest.mark.parametrize(
    "given", [7, np.int64(7), torch.tensor(7), [7, 7], (7, 7), np.array([7, 7]), torch.tensor([7, 7])], ids=repr
)
def test_a_number_for_all_or_for_each(given: object) -> None:
    assert each("seed", given, 2) == [7, 7]


def test_a_text_ends_at_its_first_end() -> None:
    ids_T = torch.tensor([4, 5, 6, 5])
    assert (end_of(ids_T, (5,)), end_of(ids_T, (9, 6, 5)), end_of(ids_T, (4,))) == (1, 1, 0)
    assert end_of(ids_T, (9,)) is end_of(ids_T, ()) is end_of(ids_T[:0], (5,)) is None
