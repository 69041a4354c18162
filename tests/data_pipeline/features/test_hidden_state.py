"""The state of a layer is the whole model's, however the model is built; what is cut off is proven not to matter."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data_pipeline.core.errors import UserError
from data_pipeline.features import hidden_state
from data_pipeline.features.hidden_state import HiddenState, agree, find_hidden_state, whole_state

VOCAB_SIZE, WIDTH, LAYERS = 50, 8, 6


class Plain(nn.Module):
    """Residual layers over embeddings, a norm of an unusual name behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(VOCAB_SIZE, WIDTH)
        self.depths = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.scaling_behind_all = nn.LayerNorm(WIDTH)
        self.never_called = nn.Linear(WIDTH, 3)

    def states(self, tokens_WL: torch.Tensor) -> list[torch.Tensor]:
        states = [self.words(tokens_WL)]
        for layer in self.depths:
            states.append(layer(states[-1]))
        return [*states[:-1], self.scaling_behind_all(states[-1])]

    def forward(self, input_ids: torch.Tensor, use_cache: bool, output_hidden_states: bool = False) -> SimpleNamespace:
        states = self.states(input_ids)
        return SimpleNamespace(
            last_hidden_state=states[-1], hidden_states=tuple(states) if output_hidden_states else None
        )


class ScaledByDepth(Plain):
    """What a layer adds depends on how many there are."""

    def states(self, tokens_WL: torch.Tensor) -> list[torch.Tensor]:
        embedded_WLF = self.words(tokens_WL) / len(self.depths)
        states = [embedded_WLF]
        for layer in self.depths:
            states.append(layer(states[-1]))
        return states


class SharedLayer(Plain):
    """One layer, run again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = nn.ModuleList([self.depths[0]])

    def states(self, tokens_WL: torch.Tensor) -> list[torch.Tensor]:
        states = [self.words(tokens_WL)]
        for _ in range(LAYERS):
            states.append(self.depths[0](states[-1]))
        return states


class SharedActivation(Plain):
    """One activation in all layers, as early models of transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Tanh()
        self.depths = nn.ModuleList(nn.Sequential(layer, shared) for layer in self.depths)


class OutsideOfLayers(Plain):
    """States that no module puts out."""

    def states(self, tokens_WL: torch.Tensor) -> list[torch.Tensor]:
        return [2 * state for state in super().states(tokens_WL)]


class Routed(nn.Module):
    """A layer of experts, of which a few words reach the second."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        state_WLF, tokens_WL = inputs
        out_WLF = self.experts[0](state_WLF)
        rare_WL = tokens_WL == 7
        if rare_WL.any():
            out_WLF[rare_WL] = self.experts[1](state_WLF[rare_WL])
        return out_WLF, tokens_WL


class Experts(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.depths = nn.ModuleList(Routed() for _ in range(LAYERS))

    def states(self, tokens_WL: torch.Tensor) -> list[torch.Tensor]:
        state, states = (self.words(tokens_WL), tokens_WL), [self.words(tokens_WL)]
        for layer in self.depths:
            state = layer(state)
            states.append(state[0])
        return states


TOKENS_WL = torch.arange(40).view(2, 20)


@torch.inference_mode()
@pytest.mark.parametrize("layer", [-3, 0, 1, -1])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [Plain, ScaledByDepth, SharedLayer, SharedActivation, OutsideOfLayers, Experts])
def test_the_state_is_the_whole_models(kind: type[Plain], whole: bool, layer: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hidden_state, "probe_tokens", without_rare_words)
    expected_WLF = kind().states(TOKENS_WL)[layer]
    state = find_hidden_state(kind(), layer, VOCAB_SIZE, whole)
    assert torch.equal(state(TOKENS_WL), expected_WLF)
    assert (state.source is None) or not whole


def without_rare_words(vocab_size: int, purpose: str) -> torch.Tensor:
    """Probes that reach no second expert."""
    return torch.arange(8, 8 + 2 * (10 + len(purpose))).view(2, -1) % vocab_size


@torch.inference_mode()
@pytest.mark.parametrize("kind", [Plain, SharedActivation])
@pytest.mark.parametrize(("layer", "num_layers"), [(-3, 4), (1, 1), (0, 0), (-1, 6)])
def test_what_comes_behind_the_state_is_dropped(kind: type[Plain], layer: int, num_layers: int):
    model = kind()
    state = find_hidden_state(model, layer, VOCAB_SIZE)
    assert (state.num_layers, len(model.depths)) == (num_layers, num_layers)
    assert [name for name, _ in model.named_parameters() if name.startswith(state.unused)] == []
    assert not list(model.never_called.parameters())
    assert bool(list(model.scaling_behind_all.parameters())) == (layer == -1)


@torch.inference_mode()
def test_of_a_whole_model_nothing_is_dropped_and_the_same_is_unused():
    whole, cut = (find_hidden_state(Plain(), -3, VOCAB_SIZE, whole) for whole in (True, False))
    assert len(whole.model.depths) == LAYERS
    assert (whole.unused, whole.num_layers) == (cut.unused, cut.num_layers)
    used = [name for name, _ in whole.model.named_parameters() if not name.startswith(whole.unused)]
    assert used == [name for name, _ in cut.model.named_parameters()]
    assert [type(part) for part in whole.model.children()] == [nn.Embedding, nn.ModuleList, nn.LayerNorm, nn.Linear]


@torch.inference_mode()
@pytest.mark.parametrize("kind", [ScaledByDepth, SharedLayer, OutsideOfLayers])
def test_where_the_proof_fails_the_whole_model_runs(kind: type[Plain]):
    model = kind()
    names = [name for name, _ in model.named_parameters()]
    state = find_hidden_state(model, -3, VOCAB_SIZE)
    assert state.source is None
    assert [name for name, _ in model.named_parameters()] == names


@torch.inference_mode()
def test_the_model_can_be_run_whole_after_the_state_was_found():
    model = Plain()
    expected_WLF = whole_state(model, TOKENS_WL, -1)
    state = find_hidden_state(model, -1, VOCAB_SIZE)
    state(TOKENS_WL)
    assert torch.equal(model(TOKENS_WL, use_cache=False).last_hidden_state, expected_WLF)


def test_states_that_are_not_there_are_refused():
    model = Plain()
    for layer in (7, -8):
        with pytest.raises(UserError, match=rf"has 6 layers: layer must be in \[-7, 6\], found {layer}"):
            find_hidden_state(model, layer, VOCAB_SIZE)
    model.forward = lambda **_: SimpleNamespace()  # type: ignore[method-assign]
    with pytest.raises(UserError, match="gives no hidden states"):
        find_hidden_state(model, 0, VOCAB_SIZE)
    model.forward = lambda **_: SimpleNamespace(hidden_states=[torch.zeros(4, 2, 3, 5)])  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"hidden states are \[4, 2, 3, 5\]"):
        find_hidden_state(model, 0, VOCAB_SIZE)


def test_states_agree_up_to_rounding_at_every_token():
    expected_WLF = torch.randn(2, 5, WIDTH)
    expected_WLF[0, 3] = 0  # such as padding
    assert agree(expected_WLF * (1 + 3e-7), expected_WLF)
    for wrong in (1.0, float("nan")):
        found_WLF = expected_WLF.clone()
        found_WLF[1, 2, 0] += wrong
        assert not agree(found_WLF, expected_WLF)


def test_a_state_of_nan_proves_nothing():
    model = Plain()
    nn.init.constant_(model.words.weight, float("nan"))
    with torch.inference_mode():
        assert find_hidden_state(model, -3, VOCAB_SIZE).source is None
    assert isinstance(find_hidden_state(Plain(), -3, VOCAB_SIZE), HiddenState)
