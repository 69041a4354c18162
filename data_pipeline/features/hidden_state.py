"""One hidden state of a language model, computed without what comes after it.

What is wanted is, by definition, `hidden_states[layer]` of the whole model, as transformers counts them. A pass over a few tokens
shows which module puts out exactly that: there later passes end, and what they never reach is dropped. So no name of a layer or
of a norm is known here, and the configuration is not shortened, on whose number of layers scales in the first ones may depend.
What is left is proven against the whole model on other tokens; where that fails, or no module puts the state out, the whole model
runs.

W windows of L tokens each, F features.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import generator

TOLERATED_ROUNDINGS = 4
"""By so many roundings of its number format may a state differ between two ways to compute it."""


class _Reached(Exception):
    """Ends a pass with the state that it was for."""

    def __init__(self, state_WLF: torch.Tensor):
        super().__init__()
        self.state_WLF = state_WLF


@dataclass(frozen=True)
class HiddenState:
    """How `hidden_states[layer]` of a model is computed: up to the module that puts it out, or (None) by the whole model."""

    model: nn.Module
    layer: int
    source: nn.Module | None
    num_layers: int
    """Layers that take part in it."""
    unused: tuple[str, ...] = ()
    """Beginnings of the names of parameters that take no part in it."""

    def __call__(self, tokens_WL: torch.Tensor) -> torch.Tensor:
        """Token ids [W, L] -> the state [W, L, F] in the model's dtype."""
        if self.source is None:
            return whole_state(self.model, tokens_WL, self.layer)
        with _hooks([self.source], _end_pass):
            try:
                _run(self.model, tokens_WL)
            except _Reached as reached:
                return reached.state_WLF
        raise AssertionError("the module ran when it was found")


def find_hidden_state(model: nn.Module, layer: int, vocab_size: int, whole: bool = False) -> HiddenState:
    """Find what computes the state, drop the rest of the model, and prove what is left against the whole.

    With `whole` nothing is dropped, and the whole model runs: for who compares with it. Raises: UserError for no such state.
    """
    layers = _layers(model)
    source, tokens_WL = _find_source(model, layer, vocab_size)
    if source is None:
        return HiddenState(model, layer, None, len(layers))
    reached: set[nn.Module] = set()
    with _hooks(model.modules(), lambda module, *_: reached.add(module), before=True):
        HiddenState(model, layer, source, len(layers))(tokens_WL)
    num_layers = sum(_ran(member, reached) for member in layers)
    proof_WL = probe_tokens(vocab_size, "proof")
    expected_WLF = whole_state(model, proof_WL, layer)
    parts = list(_not_reached(model, reached))
    for part in reversed(parts):
        part.drop()
    cut = HiddenState(model, layer, source, num_layers, tuple(part.prefix for part in parts))
    proven = _agrees(cut, proof_WL, expected_WLF)
    if whole or not proven:
        for part in parts:
            part.put_back()
    if not proven:
        return HiddenState(model, layer, None, len(layers))
    return HiddenState(model, layer, None, num_layers, cut.unused) if whole else cut


def whole_state(model: nn.Module, tokens_WL: torch.Tensor, layer: int) -> torch.Tensor:
    """The state [W, L, F] by the whole model. Raises: UserError where there is none of that number, or of that shape."""
    states = getattr(_run(model, tokens_WL, output_hidden_states=True), "hidden_states", None)
    if not states:
        raise UserError("it gives no hidden states; take another teacher")
    if not -len(states) <= layer < len(states):
        raise UserError(
            f"it has {len(states) - 1} layers: layer must be in [{-len(states)}, {len(states) - 1}], found {layer}"
        )
    state_WLF = states[layer]
    if state_WLF.ndim != 3 or state_WLF.shape[:2] != tokens_WL.shape:
        raise UserError(
            f"its hidden states are {list(state_WLF.shape)} for {list(tokens_WL.shape)} tokens, expected [W, L, F]; take "
            "another teacher"
        )
    return state_WLF


def probe_tokens(vocab_size: int, purpose: str) -> torch.Tensor:
    """Two windows of a few tokens, other ones for each purpose."""
    length = 16 + len(purpose)
    return torch.from_numpy(generator("teacher probe", purpose).integers(0, vocab_size, (2, length)))


def agree(found_WLF: torch.Tensor, expected_WLF: torch.Tensor) -> bool:
    """Whether two ways to compute a state gave the same at every token, up to rounding."""
    error_WL = (found_WLF.float() - expected_WLF.float()).norm(dim=-1)
    tolerance = TOLERATED_ROUNDINGS * torch.finfo(expected_WLF.dtype).eps
    return bool((error_WL <= tolerance * expected_WLF.float().norm(dim=-1)).all())  # not where there is a NaN


@dataclass(frozen=True)
class _Part:
    """A module within another one, or the end of a list of modules."""

    parent: nn.Module
    name: str
    module: nn.Module
    prefix: str

    def drop(self) -> None:
        if isinstance(self.parent, nn.ModuleList):
            del self.parent[int(self.name)]
        else:
            setattr(self.parent, self.name, nn.Identity())

    def put_back(self) -> None:
        if isinstance(self.parent, nn.ModuleList):
            self.parent.append(self.module)
        else:
            setattr(self.parent, self.name, self.module)


def _not_reached(parent: nn.Module, reached: set[nn.Module], prefix: str = "") -> Iterator[_Part]:
    """Modules that a pass did not run, and the members of a list of modules behind the last one that ran.

    Nothing within a member of a list is yielded: which of a layer's experts run depends on the tokens.
    """
    for name, module in parent.named_children():
        inner = f"{prefix}{name}."
        if isinstance(module, nn.ModuleList):
            kept = max((i + 1 for i, member in enumerate(module) if _ran(member, reached)), default=0)
            yield from (_Part(module, str(i), module[i], f"{inner}{i}.") for i in range(kept, len(module)))
        elif reached & set(module.modules()):
            yield from _not_reached(module, reached, inner)
        else:
            yield _Part(parent, name, module, inner)


def _ran(member: nn.Module, reached: set[nn.Module]) -> bool:
    """Whether a member of a list of modules ran itself. Not by what is in it: members may share an activation."""
    if isinstance(member, nn.ModuleList | nn.ModuleDict):  # these never run themselves
        return any(_ran(part, reached) for part in member.children())
    return member in reached


def _layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules that is not within another one."""
    longest = nn.ModuleList()
    for module in model.children():
        found = module if isinstance(module, nn.ModuleList) else _layers(module)
        longest = max(longest, found, key=len)
    return longest


def _find_source(model: nn.Module, layer: int, vocab_size: int) -> tuple[nn.Module | None, torch.Tensor]:
    """The last module that puts out the state, and the tokens on which it did."""
    tokens_WL = probe_tokens(vocab_size, "search")
    outputs: list[tuple[nn.Module, Any]] = []
    with _hooks(model.modules(), lambda module, _, output: outputs.append((module, _first(output)))):
        state_WLF = whole_state(model, tokens_WL, layer)
    found = (
        module
        for module, output in reversed(outputs)
        if isinstance(output, torch.Tensor) and output.shape == state_WLF.shape and torch.equal(output, state_WLF)
    )
    return next(found, None), tokens_WL


def _agrees(state: HiddenState, tokens_WL: torch.Tensor, expected_WLF: torch.Tensor) -> bool:
    try:
        return agree(state(tokens_WL), expected_WLF)
    except Exception:  # whatever a model raises that misses a part: it cannot do without
        return False


def _run(model: nn.Module, tokens_WL: torch.Tensor, **options: bool) -> Any:
    return model(input_ids=tokens_WL, use_cache=False, **options)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _end_pass(_module: nn.Module, _inputs: Any, output: Any) -> None:
    raise _Reached(_first(output))


@contextmanager
def _hooks(modules: Iterable[nn.Module], hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    """Call the hook whenever one of the modules has run, or (`before`) is about to."""
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
