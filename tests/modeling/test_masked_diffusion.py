"""Masked diffusion: the bound of the true conditional distributions is -log p itself, for every document, and its estimate unbiased."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from modeling.attention import Segments
from modeling.masked_diffusion import draw_masks, ranks_in_windows, sample_targets, window_nats
from modeling.shapes import TokenTransformerConfig
from modeling.token_transformer import TokenTransformer

V, N = 3, 4
"""Tokens of the vocabulary and of a document whose joint distribution is known."""


def joint() -> torch.Tensor:
    """Random probabilities [V, V, V, V] of all documents."""
    p = torch.rand((V,) * N, generator=torch.Generator().manual_seed(2), dtype=torch.float64) ** 3
    return p / p.sum()


class TrueConditionals:
    """Predicts every masked token by Bayes' rule from the unmasked ones of its window. The "hidden state" is the logits."""

    def __init__(self) -> None:
        self.joint, self.config = joint(), SimpleNamespace(vocab_size=V)

    def __call__(self, inputs_T: torch.Tensor, windows: Segments, is_target_T: torch.Tensor) -> torch.Tensor:
        assert set(windows.lengths) == {N}
        logits = torch.zeros(len(inputs_T), V, dtype=torch.float64)
        for start in range(0, len(inputs_T), N):
            document = inputs_T[start : start + N].tolist()
            known = self.joint[tuple(slice(None) if token == V else slice(token, token + 1) for token in document)]
            for i, token in enumerate(document):
                if token == V:
                    logits[start + i] = known.sum(dim=[d for d in range(N) if d != i]).log()
        return logits

    def token_nats(self, hidden_TV: torch.Tensor, tokens_T: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(hidden_TV, tokens_T, reduction="none")


def test_the_bound_of_the_true_conditionals_is_minus_log_p() -> None:
    """Averaged over every number of masks and every choice of them, exactly."""
    model, document = TrueConditionals(), torch.tensor([0, 2, 1, 1])
    windows, targets_T = Segments.from_lengths([N]), torch.ones(N, dtype=torch.bool)
    orders = list(itertools.permutations(range(N)))
    total = 0.0
    for order in orders:
        scores_T = torch.tensor(order, dtype=torch.float32)
        found_W = window_nats(model, document, targets_T, windows, torch.tensor([0.5]), lambda _: scores_T, N)  # type: ignore[arg-type]  # noqa: B023
        total += float(found_W)
    assert total / len(orders) == pytest.approx(-math.log(joint()[tuple(document)]), rel=1e-6)


def test_the_estimate_is_unbiased() -> None:
    model, generator = TrueConditionals(), torch.Generator().manual_seed(0)
    documents = torch.randint(0, V, (400, N), generator=generator)[0].repeat(400)  # one document, many draws
    windows, targets_T = Segments.from_lengths([N] * 400), torch.ones(400 * N, dtype=torch.bool)
    uniform_W = torch.rand(400, generator=generator, dtype=torch.float64)
    found_W = window_nats(
        model, documents, targets_T, windows, uniform_W,  # type: ignore[arg-type]
        lambda _: torch.rand(400 * N, generator=generator), 2,
    )  # fmt: skip
    expected = -math.log(joint()[tuple(documents[:N])])
    assert abs(float(found_W.mean()) - expected) < 4 * float(found_W.std()) / 20


def test_masks_are_of_targets_alone_as_many_as_the_share_says_and_weigh_n_over_m() -> None:
    lengths, generator = [10, 1, 7, 6], torch.Generator().manual_seed(1)
    windows = Segments.from_lengths(lengths)
    is_target_T = torch.tensor([0] * 4 + [1] * 6 + [1] + [0] * 7 + [1] * 6).bool()  # 6, 1, 0 and 6 targets
    scores_T = torch.randn(24, generator=generator)
    for share, counts in ((0.0, [1, 1, 0, 1]), (0.5, [4, 1, 0, 4]), (0.999, [6, 1, 0, 6])):
        masks = draw_masks(is_target_T, windows, torch.full((4,), share), scores_T)
        assert [int(part.sum()) for part in masks.is_masked_T.split(lengths)] == counts
        assert not (masks.is_masked_T & ~is_target_T).any()
        expected_W = torch.tensor([n / max(m, 1) for n, m in zip((6, 1, 0, 6), counts, strict=True)])
        torch.testing.assert_close(masks.weights_T, masks.is_masked_T * expected_W[windows.ids_T])


def test_ranks_are_those_of_the_scores_within_a_windows_targets() -> None:
    windows = Segments.from_lengths([4, 3])
    is_target_T = torch.tensor([0, 1, 1, 1, 1, 0, 1]).bool()
    ranks_T = ranks_in_windows(is_target_T, windows, torch.tensor([-9.0, 0.3, 0.1, 0.2, 5.0, 0.0, 4.0]))
    assert ranks_T[is_target_T].tolist() == [2, 0, 1, 1, 0]


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_samples_have_their_lengths_and_no_mask(num_steps: int) -> None:
    torch.manual_seed(0)
    model = TokenTransformer(
        TokenTransformerConfig(vocab_size=V, width=16, num_layers=1, head_dim=16), num_marks=1, with_roles=True
    )
    contexts, lengths = [torch.tensor([1, 2]), torch.zeros(0, dtype=torch.int64)], [5, 1]
    steps: list[int] = []
    found, again, other = (
        sample_targets(model.eval(), contexts, lengths, num_steps, generators(2, s), lambda: steps.append(1))
        for s in (3, 3, 4)
    )
    assert [len(part) for part in found] == lengths
    assert all(0 <= token < V for part in found for token in part.tolist())
    assert [p.tolist() for p in found] == [p.tolist() for p in again] != [p.tolist() for p in other]
    assert len(steps) == 3 * num_steps


def test_samples_of_the_true_conditionals_are_distributed_as_the_documents() -> None:
    """One token a step: then every order of revealing them is the chain rule."""
    model = TrueConditionals()
    model.lm_head = _Identity()  # type: ignore[attr-defined]
    found = sample_targets(
        model,
        [torch.zeros(0, dtype=torch.int64)] * 1500,
        [N] * 1500,
        N,
        generators(1500),
    )
    counts = torch.zeros((V,) * N, dtype=torch.float64)
    for document in found:
        counts[tuple(document.tolist())] += 1
    expected = joint() * len(found)
    chi_square = float(((counts - expected) ** 2 / expected.clamp_min(1e-12))[expected > 5].sum())
    assert chi_square < 2 * int((expected > 5).sum())


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1500 * seed + i) for i in range(count)]


class _Identity:
    weight = torch.zeros(1)

    def __call__(self, logits_MV: torch.Tensor) -> torch.Tensor:
        return logits_MV
