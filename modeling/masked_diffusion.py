"""Masked diffusion of tokens (MDLM, arXiv 2406.07524): targets are masked, the network says what stood there.

With the share of masked tokens falling linearly in time, the bound on -log p(x | c) is the integral over t from 0 to 1 of 1/t times the
cross-entropy of the tokens masked at t, each with probability t. A network that is not told t sees only how many are masked, so the
draw of that number is summed out: the integral of t^(m-1) (1-t)^(n-m) over the ways to mask m of n is 1/m for every m. So

    -log p(x | c)  <=  sum over m = 1..n of 1/m E[cross-entropy of m random ones]  =  E over m uniform in 1..n of n/m [the same]

which is the same number with a finite variance (cf. LLaDA, arXiv 2502.09992). With the true conditional distributions it is -log p itself,
by the chain rule in a random order.

Shape letters: T packed tokens, W windows, N windows with targets, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .attention import Segments
from .token_transformer import TokenTransformer


class Masks(NamedTuple):
    """Where tokens are masked, bool [T], and the weight n/m of their cross-entropies, fp32 [T], 0 elsewhere."""

    is_masked_T: torch.Tensor
    weights_T: torch.Tensor


def draw_masks(is_target_T: torch.Tensor, windows: Segments, share_W: torch.Tensor, scores_T: torch.Tensor) -> Masks:
    """Of each window's n targets m = floor(share n) + 1, those with the lowest scores.

    Args:
        share_W: in [0, 1); uniform for the bound.
        scores_T: independent and identically distributed, so that every choice of m is as likely.
    """
    ids_T = windows.ids_T
    num_targets_W = torch.zeros(len(windows.lengths), device=ids_T.device).index_add(0, ids_T, is_target_T.float())
    num_masked_W = (share_W.to(ids_T.device, torch.float64) * num_targets_W).floor() + 1
    is_masked_T = is_target_T & (ranks_in_windows(is_target_T, windows, scores_T) < num_masked_W[ids_T])
    weight_W = (num_targets_W / num_masked_W).float()
    return Masks(is_masked_T, weight_W[ids_T] * is_masked_T)


def ranks_in_windows(is_target_T: torch.Tensor, windows: Segments, scores_T: torch.Tensor) -> torch.Tensor:
    """Int64 [T]: by how many targets of its window a target's score is exceeded from below; other tokens come behind."""
    order_T = torch.where(is_target_T, scores_T, torch.inf).argsort(stable=True)
    order_T = order_T[windows.ids_T[order_T].argsort(stable=True)]  # by window, and by score within
    return torch.empty_like(order_T).index_copy(0, order_T, windows.positions_T)


def masked_inputs(tokens_T: torch.Tensor, is_masked_T: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The mask's input id is the one behind the vocabulary."""
    return torch.where(is_masked_T, vocab_size, tokens_T)


@torch.no_grad()
def window_nats(
    model: TokenTransformer,
    tokens_T: torch.Tensor,
    is_target_T: torch.Tensor,
    windows: Segments,
    uniform_W: torch.Tensor,
    scores_of: Callable[[int], torch.Tensor],
    num_draws: int,
) -> torch.Tensor:
    """Unbiased estimate of each window's bound in nats, float64 [W], from `num_draws` numbers of masks spread evenly over 1..n.

    Args:
        uniform_W: in [0, 1), one a window.
        scores_of: the i-th draw's scores [T].
    """
    total_W = torch.zeros(len(windows.lengths), dtype=torch.float64, device=tokens_T.device)
    for i in range(num_draws):
        masks = draw_masks(is_target_T, windows, (uniform_W + i) / num_draws, scores_of(i))
        inputs_T = masked_inputs(tokens_T, masks.is_masked_T, model.config.vocab_size)
        nats_T = model.token_nats(model(inputs_T, windows, is_target_T), tokens_T)
        total_W.index_add_(0, windows.ids_T, (nats_T * masks.weights_T).double())
    return total_W / num_draws


@torch.no_grad()
def sample_targets(
    model: TokenTransformer,
    contexts: Sequence[torch.Tensor],
    lengths: Sequence[int],
    num_steps: int,
    generators: Sequence[torch.Generator],
    on_step: Callable[[], None] = lambda: None,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Int64 tokens of each target, on the CPU: all masked at first, an equal share revealed in each step, in random order.

    Args:
        contexts: int64 tokens of each window's context; lengths: of its target.
        generators: of each window, on the CPU: what is drawn for it does not depend on the others.
        temperature: divides the logits.
    """
    device = model.lm_head.weight.device
    mask = model.config.vocab_size
    pieces = [part for context, n in zip(contexts, lengths, strict=True) for part in (context, torch.full((n,), mask))]
    tokens_T = torch.cat(pieces).to(device)
    is_target_T = tokens_T == mask
    windows = Segments.from_lengths([len(context) + n for context, n in zip(contexts, lengths)], device)
    scores_T = torch.cat([torch.rand(n, generator=one) for n, one in zip(windows.lengths, generators, strict=True)])
    ranks_T = ranks_in_windows(is_target_T, windows, scores_T.to(device))
    num_targets_T = torch.tensor(list(lengths), device=device)[windows.ids_T]
    for step in reversed(range(num_steps)):
        hidden_TD = model(tokens_T, windows, is_target_T)
        stays_T = ranks_T < num_targets_T * step // num_steps
        places_M = ((tokens_T == mask) & ~stays_T).nonzero()[:, 0]
        counts_W = windows.ids_T[places_M].bincount(minlength=len(generators)).tolist()
        logits_MV = model.lm_head(hidden_TD[places_M]).float() / temperature
        tokens_T[places_M] = torch.cat([_drawn(*of_one) for of_one in zip(logits_MV.split(counts_W), generators)])
        on_step()
    return [
        part.split([len(context), n])[1]
        for part, context, n in zip(tokens_T.cpu().split(list(windows.lengths)), contexts, lengths, strict=True)
    ]


def _drawn(logits_MV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A token [M] of each distribution."""
    if not len(logits_MV):
        return logits_MV.new_zeros(0, dtype=torch.int64)
    drawn_M1 = torch.multinomial(logits_MV.softmax(-1).cpu(), 1, generator=generator)
    return drawn_M1[:, 0].to(logits_MV.device)
