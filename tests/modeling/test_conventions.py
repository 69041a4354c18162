"""Where generate's settings come from, and rows with padding."""

import pytest
import torch
from transformers import GenerationConfig

from modeling.conventions import chosen, end_ids, right_padded, row_texts


def test_the_call_counts_before_its_config_and_that_before_the_models() -> None:
    passed, models = (
        GenerationConfig(num_steps=5, seed=3),
        GenerationConfig(num_steps=7, solver="heun", max_new_tokens=9),
    )
    found = chosen({"num_steps": None, "seed": 0}, passed, models)
    assert [found[name] for name in ("num_steps", "seed", "solver", "max_new_tokens", "best_of")] == [
        5,
        0,
        "heun",
        9,
        1,
    ]
    assert chosen({}, None, models)["num_steps"] == 7
    assert chosen({}, None)["max_new_tokens"] == 128


def test_a_total_length_counts_against_new_tokens_of_a_later_source_alone() -> None:
    models = GenerationConfig(max_new_tokens=9)
    found = chosen({"max_length": 4}, None, models)
    assert (found["max_length"], found["max_new_tokens"]) == (4, None)
    found = chosen({"max_new_tokens": 5}, GenerationConfig(max_length=4), models)
    assert (found["max_length"], found["max_new_tokens"]) == (None, 5)


def test_what_has_no_meaning_is_refused_where_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="no use for num_beams"):
        chosen({"num_beams": 3}, None)
    with pytest.raises(ValueError, match="no use for top_k"):
        chosen({}, GenerationConfig(top_k=3))
    chosen({"num_beams": None, "do_sample": False}, None, GenerationConfig(top_k=3))


def test_rows_and_texts() -> None:
    rows = torch.tensor([[0, 1, 2], [3, 0, 0]])
    texts = row_texts(rows, torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert [ids_T.tolist() for ids_T in texts] == [[1, 2], [3]]
    assert right_padded(texts, 9).tolist() == [[1, 2], [3, 9]]
    assert [ids_T.tolist() for ids_T in row_texts(rows)] == rows.tolist()
    assert (end_ids(None), end_ids(4), end_ids([4, 5])) == ((), (4,), (4, 5))
