"""The baselines' network: what a causal one may see, that its stock class computes the same, and what -log p adds up to."""

import pytest
import torch
from torch.nn import functional as F

from modeling.attention import Segments
from modeling.shapes import TokenTransformerConfig
from modeling.stock_language_model import continuation, stock_language_model
from modeling.token_transformer import TokenTransformer, causal_inputs

V, START = 23, 0
LENGTHS = [5, 1, 140, 9]


def make_model(**changes: object) -> TokenTransformer:
    """With random weights everywhere."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "width": 32, "num_layers": 2, "head_dim": 16, **changes}
    model = TokenTransformer(TokenTransformerConfig(**shape))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> TokenTransformer:
    return make_model()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(1, V, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))


def logits_of(model: TokenTransformer, tokens_T: torch.Tensor) -> torch.Tensor:
    windows = Segments.from_lengths(LENGTHS, causal=True)
    return model.lm_head(model(causal_inputs(tokens_T, windows, START), windows))


def test_inputs_are_the_tokens_before_and_the_start_where_a_window_begins() -> None:
    windows = Segments.from_lengths([3, 1, 2])
    assert causal_inputs(torch.tensor([5, 6, 7, 8, 9, 1]), windows, START).tolist() == [START, 5, 6, START, START, 9]


@pytest.mark.parametrize("place", [0, 3, 5, 6, 90, 150])
def test_a_token_moves_no_probability_up_to_its_own_and_none_of_another_window(
    model: TokenTransformer, place: int
) -> None:
    other_T = tokens()
    other_T[place] = (other_T[place] + 1) % V
    changed_T = (logits_of(model, tokens()) - logits_of(model, other_T)).abs().amax(-1) > 1e-4
    windows = Segments.from_lengths(LENGTHS)
    behind_T = (windows.ids_T == windows.ids_T[place]) & (torch.arange(len(changed_T)) > place)
    assert torch.equal(changed_T, behind_T)


def test_the_stock_class_computes_the_same(model: TokenTransformer) -> None:
    stock = stock_language_model(model, START, max_window=160)
    expected = logits_of(model, tokens()).split(LENGTHS)
    for tokens_L, logits_LV in zip(tokens().split(LENGTHS), expected, strict=True):
        ids = torch.cat((torch.tensor([START]), tokens_L))[None]
        assert torch.allclose(stock(input_ids=ids).logits[0, :-1], logits_LV, atol=2e-4, rtol=1e-4)


def test_what_the_stock_class_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="qk_norm"):
        stock_language_model(make_model(qk_norm=True), START, 10)
    with_roles = TokenTransformer(make_model().config, with_roles=True)
    with pytest.raises(ValueError, match="roles"):
        stock_language_model(with_roles, START, 10)


def test_continuations_have_their_length_and_depend_on_the_seed_alone(model: TokenTransformer) -> None:
    stock = stock_language_model(model, START, max_window=160)
    context_T = torch.tensor([4, 5, 6])
    state = torch.random.get_rng_state()
    first, again, other = (continuation(stock, context_T, 12, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(first) == 12
    assert first == again != other
    assert len(continuation(stock, context_T[:0], 12, 3)) == 12


def test_continuations_are_drawn_from_the_models_probabilities() -> None:
    """With the start token, which ends texts, as often as the model says: generation neither stops at it nor leaves it out."""
    alike = make_model()  # every token looks the same to it, so that all that it draws is of one distribution
    alike.embedding.weight.copy_(alike.embedding.weight[:1].expand_as(alike.embedding.weight))
    alike.lm_head.weight.mul_(0.3)
    windows = Segments.from_lengths([3], causal=True)
    expected_V = alike.lm_head(alike(torch.tensor([4, 5, 6]), windows)[-1]).softmax(-1)
    drawn = torch.tensor(continuation(stock_language_model(alike, START, max_window=400), torch.tensor([4]), 400, 0))
    found_V = drawn.bincount(minlength=V) / len(drawn)
    assert found_V[START] > 0
    assert (found_V - expected_V).abs().max() < 4 * 0.5 / len(drawn) ** 0.5


def test_token_nats_are_the_cross_entropies(model: TokenTransformer) -> None:
    windows = Segments.from_lengths(LENGTHS, causal=True)
    hidden_TD = model(causal_inputs(tokens(), windows, START), windows)
    expected_T = F.cross_entropy(model.lm_head(hidden_TD), tokens(), reduction="none")
    assert torch.allclose(model.token_nats(hidden_TD, tokens()), expected_T, atol=1e-5)
