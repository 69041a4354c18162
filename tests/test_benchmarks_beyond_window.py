"""The benchmark of texts beyond the window counts what it says; on models whose answers are known."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import beyond_window

PATHS = {1: [[1, 1], [2, 2], [2, 2], [2, 3], [2, 3]], 2: [[5, 5], [6, 6], [7, 7], [8, 8], [9, 9]]}
"""By prompt, the tokens of every step; the last are the text."""


class Known:
    """A model that draws these paths, whose bounds of four candidates are known."""

    config = SimpleNamespace(max_window=8)

    def generate(
        self, prompts: Sequence[Sequence[int]], new: int, on_step: Any = None, seed: Any = (), **_: Any
    ) -> list:
        for step in range(5) if on_step else ():
            on_step(step, 1 - step / 5, [torch.tensor(PATHS[prompt[0]][step]) for prompt in prompts])
        return [
            torch.tensor([one, one] if seed and on_step is None else PATHS[p[0]][-1]) for p, one in zip(prompts, seed)
        ]

    def nll(self, prompts: Sequence[Any], targets: Sequence[Any], seed: Any = ()) -> torch.Tensor:
        bounds = [5.0, 3.0, 9.0, 1.0, 1.0, 2.0, 3.0, 4.0]
        return torch.tensor([bounds[int(target[0]) % 8] for target in targets], dtype=torch.float64)


class Teacher:
    """Gives a text as many nats as its first token says."""

    def nats(self, prompts: Any, targets: Sequence[Sequence[int]], seeds: Any) -> list[float]:
        return [float(target[0]) for target in targets]


def test_a_text_ends_where_so_many_estimates_are_the_same() -> None:
    rows = {row["patience"]: row for row in beyond_window.ending_early(Known(), [[1], [2]], 2)}  # type: ignore[arg-type]
    # The first text ends at its third step of five with one of two tokens wrong, the second never.
    assert rows[2]["evaluations_saved"] == pytest.approx((2 / 5 + 0) / 2)
    assert rows[2]["tokens_changed"] == pytest.approx((1 / 2 + 0) / 2)
    assert (rows[3]["evaluations_saved"], rows[3]["tokens_changed"]) == (0, 0)


def test_the_candidate_of_the_least_bound_among_the_first_is_kept() -> None:
    rows = {row["best_of"]: row for row in beyond_window.choosing(Known(), Teacher(), [[1], [2]], 2, 3)}  # type: ignore[arg-type]
    # Of the first prompt the candidates 0, 1, 3, of the second 4 always.
    assert [rows[count]["teacher_nats"] for count in (1, 2, 4)] == [(0 + 4) / 4, (1 + 4) / 4, (3 + 4) / 4]
    assert rows[4]["minus_first"] == pytest.approx((1.5 + 0) / 2)


def test_documents_are_held_out_if_a_heldout_window_begins_as_they_do(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [[i] * 40 for i in range(4)] + [[1] * 10]
    monkeypatch.setattr(beyond_window, "open_source", lambda _: texts)

    def tokenizer(text: list[int], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=text)

    windows = [[1] * 30, [3] * 30, [9] * 30]
    for seen, expected in ((False, [1, 3]), (True, [0, 2])):
        found = list(beyond_window.long_documents("x", tokenizer, windows, 32, 36, seen))
        assert found == [[i] * 36 for i in expected]


def test_later_blocks_are_set_against_the_first_of_the_same_document() -> None:
    """Bounds and nats are functions of a block's first token, 4, 8, ...; a block more in a whole costs 0.4 a token."""
    documents = [list(range(32)), list(range(19))]
    model, teacher = Known(), Teacher()
    asked = []

    def nll(prompts: Any, targets: Any, seed: Any, block_size: int = 4) -> torch.Tensor:
        asked.extend(zip(prompts, targets, seed, strict=True))
        blocks = [[ids[i] ** 2 for i in range(0, len(ids), block_size)] for ids in targets]
        return torch.tensor([sum(values) + 1.6 * (len(values) - 1) for values in blocks], dtype=torch.float64)

    model.nll = nll  # type: ignore[method-assign, assignment]
    found = beyond_window.by_block(model, teacher, documents)  # type: ignore[arg-type]
    starts = [4, 8, 12, 16, 20, 24, 28]
    assert found["nats_by_block"] == [start**2 / 4 for start in starts]
    ours = [(sum(s**2 for s in own[1:]) / (len(own) - 1) - 16) / 4 for own in (starts, starts[:3])]
    theirs = [(sum(own[1:]) / (len(own) - 1) - 4) / 4 for own in (starts, starts[:3])]
    assert found["later_minus_first"] == pytest.approx(sum(ours) / 2)
    assert found["teacher_later_minus_first"] == pytest.approx(sum(theirs) / 2)
    assert found["beside_teacher"] == pytest.approx(sum(ours) / 2 - sum(theirs) / 2)
    assert found["beside_teacher_error"] == pytest.approx(abs(ours[0] - theirs[0] - ours[1] + theirs[1]) / 2)
    assert found["later_minus_as_first"] == pytest.approx(0.4)
    assert (found["documents"], found["later_blocks"]) == (2, 6 + 2)
    assert all(len(prompt) == 4 for prompt, _, _ in asked)
    wholes = [(targets, seed) for _, targets, seed in asked if len(targets) > 4]
    assert [len(targets) for targets, _ in wholes] == [28, 12]  # whole blocks
    # The noise of a whole is that of its first block by itself, and of no other block.
    assert [sum(seed == own for _, _, own in asked) for _, seed in wholes] == [2, 2]
