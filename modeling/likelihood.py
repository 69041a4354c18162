"""An upper bound on -log p(target tokens | context) of a latent diffusion model, in nats, comparable with any language model's.

For every time t0 in (0, 1], with z_t = (1 - t) z + t eps, SNR(t) = ((1 - t) / t)^2 and the flow loss L(t) per channel,

    -log p(x | c)  <=  E[-log p(x | z_t0, c)]  +  integral from t0 to 1 of (1 - t) / t * Z * L(t) dt

The first part is the cross-entropy of any decoder that is a distribution. The second is KL(q(z_t0 | x) || p(z_t0 | c)), half the integral
of -dSNR/dt E|z - z_hat|^2 (VDM, arXiv 2107.00630; Plaid, 2305.18619), written in velocities: z_hat - z = t (v* - v_hat). Nothing is left at
t = 1, which is pure noise; no noise of the encoder and no cut-off at t = 0 come in. The least over a grid of t0 counts.

The inequality holds for every map from tokens to the z that is noised, whatever the model was trained on: the encoder's latents carry
what their neighbours did to them, which is no part of x and costs nats all the same. A categorical head knows each token's mean latent,
and its bound is measured from there (`told_latents`).

Tokens need not go together: the chain rule holds along every path on which each token's time falls from 1 to t0, with the sum over tokens
of the same integral, each over its own times. A model that was trained with times spread over a window's tokens is measured along such
paths, on which some tokens are decided before their neighbours (`spread_nats`).

Sums are float64. Shape letters: T packed tokens, N documents (windows), G times of the grid, Z latent dim, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import flow
from .attention import Segments
from .continuation import encode_each
from .heads import CategoricalHead, TokenTargets
from .losses import ClassScores, categorical_loss
from .text_dit import TextDiT
from .text_vae import TextVAE


def time_grid(num_times: int = 24, first: float = 0.1) -> tuple[float, ...]:
    """Rising times from `first` to 1, evenly spaced in the logarithm of the signal-to-noise ratio up to 0.985; each one is a t0 too."""
    start, end = (math.log(t / (1 - t)) for t in (first, 0.985))
    inner = torch.linspace(start, end, num_times - 1, dtype=torch.float64).sigmoid()
    return (*inner.tolist(), 1.0)


@functools.cache
def quadrature(times: Sequence[float]) -> torch.Tensor:
    """Float64 [G, G]: row j holds the weights by which values at the times add up to their integral from times[j] to times[-1].

    The trapezoid rule with its correction by slopes, h^2 / 12 (f'(a) - f'(b)), which are those of parabolas through three neighbours: exact
    for parabolas, error O(h^4) inside. The same for all rows, and linear in the values, so that documents' integrals average to the mean's.
    """
    times_G = torch.tensor(times, dtype=torch.float64)
    num, steps = len(times), times_G.diff()
    if num < 3 or not (steps > 0).all():
        raise ValueError(f"the grid needs at least 3 rising times, found {[round(t, 4) for t in times[:6]]}")
    slopes_GG = torch.zeros(num, num, dtype=torch.float64)
    for i in range(num):
        # The parabola through three neighbours, at its ends the outermost three.
        a, b, c = (min(max(i, 1), num - 2) + k for k in (-1, 0, 1))
        ta, tb, tc, t = (times_G[k] for k in (a, b, c, i))
        slopes_GG[i, a] = (2 * t - tb - tc) / ((ta - tb) * (ta - tc))
        slopes_GG[i, b] = (2 * t - ta - tc) / ((tb - ta) * (tb - tc))
        slopes_GG[i, c] = (2 * t - ta - tb) / ((tc - ta) * (tc - tb))
    identity_GG = torch.eye(num, dtype=torch.float64)
    pieces_GG = steps[:, None] / 2 * (identity_GG[:-1] + identity_GG[1:])
    pieces_GG += steps[:, None] ** 2 / 12 * (slopes_GG[:-1] - slopes_GG[1:])
    from_end_GG = pieces_GG.flip(0).cumsum(0).flip(0)
    return torch.cat((from_end_GG, torch.zeros(1, num, dtype=torch.float64)))


LAST_T0 = 0.95
"""The last t0 that may be asked for by itself: at 1, where a model that knows nothing has its least bound, there is no integral."""
SPREAD_LEVELS = 16
"""Of the integral along paths with a time of its own for each token: how many levels of noise."""
LEVELS_AHEAD, OWN_WIDTH, LEVELS_WIDTH = 0.4, 0.6, 0.8
"""Where the levels lie: in a logistic distribution around the logit of t0, or 0 where that is less, plus the first number, of a scale that
is the third times the root of the sum of the squares of the tokens' spread and the second, a width of one token's own part."""


class Denoised(NamedTuple):
    """What a model makes of noisy latents: a velocity fp32 [T, Z], and the nats of every true token, [T], which count at targets alone."""

    velocity_TZ: torch.Tensor
    nats_T: torch.Tensor


Denoiser = Callable[[torch.Tensor, torch.Tensor], Denoised]
"""Called with (z_t [T, Z], the tokens' times [T])."""


@dataclass(frozen=True)
class DocumentNats:
    """What was measured of each document, on the CPU.

    Attributes:
        times: G of them; each is a t0.
        flow_parts_NG: the integral from each time to 1, in nats a document.
        cross_entropies_NG: nats of the true tokens given z_t and the context, summed over target tokens.
        tokens_N: number of target tokens, > 0.
    """

    times: tuple[float, ...]
    flow_parts_NG: torch.Tensor
    cross_entropies_NG: torch.Tensor
    tokens_N: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence["DocumentNats"]) -> "DocumentNats":
        """All documents of several measurements on one grid."""
        if not parts or any(part.times != parts[0].times for part in parts):
            raise ValueError(f"expected measurements on one grid of times, found {len({p.times for p in parts})} grids")
        columns = zip(*((part.flow_parts_NG, part.cross_entropies_NG, part.tokens_N) for part in parts))
        return cls(parts[0].times, *(torch.cat(column) for column in columns))

    def __getitem__(self, chosen: slice | torch.Tensor) -> "DocumentNats":
        """Some of the documents."""
        return DocumentNats(
            self.times, self.flow_parts_NG[chosen], self.cross_entropies_NG[chosen], self.tokens_N[chosen]
        )

    def __len__(self) -> int:
        return len(self.tokens_N)

    @functools.cached_property
    def bounds_NG(self) -> torch.Tensor:
        """The bound at every t0, in nats a document."""
        return self.cross_entropies_NG + self.flow_parts_NG

    @property
    def curve(self) -> list[float]:
        """The bound at every t0, in nats a token."""
        return (self.bounds_NG.sum(0) / self.tokens_N.sum()).tolist()

    @property
    def best(self) -> int:
        """The index of the t0 at which the bound is least."""
        return int(self.bounds_NG.sum(0).argmin())


class Bound(NamedTuple):
    """Upper bound on the negative log-likelihood, in nats a target token.

    Attributes:
        nats: cross_entropy + flow.
        error: standard error over documents.
        t0: where it was taken, the mean of two where they were chosen crosswise.
        cross_entropy, flow: its two parts.
        tokens, documents: how many it is over.
    """

    nats: float
    error: float
    t0: float
    cross_entropy: float
    flow: float
    tokens: int
    documents: int


@torch.no_grad()
def document_nats(
    denoise: Denoiser,
    data_TZ: torch.Tensor,
    noise_of: Callable[[int], torch.Tensor],
    documents_T: torch.Tensor,
    is_target_T: torch.Tensor,
    times: tuple[float, ...],
) -> DocumentNats:
    """Measure a batch of documents at every time of a rising grid that ends at 1; those without a target token are left out.

    Args:
        denoise: the model, with the context in it; called once a time with all positions noised.
        data_TZ: clean latents.
        noise_of: standard normal noise [T, Z] of the i-th time. Of another key for each it makes the sum over times less noisy.
        documents_T: int64 [T], each token's document, from 0; is_target_T: bool [T], what counts.
    """
    at_times = [torch.full(documents_T.shape, t, dtype=torch.float64, device=data_TZ.device) for t in times]
    errors_GT, cross_entropies_GT = _measured(denoise, data_TZ, noise_of, at_times)
    times_G = torch.tensor(times, dtype=torch.float64, device=data_TZ.device)
    weights_GG = quadrature(times).to(times_G) * ((1 - times_G) / times_G)
    return _by_document(times, weights_GG @ errors_GT, cross_entropies_GT, documents_T, is_target_T)


@torch.no_grad()
def spread_nats(
    denoise: Denoiser,
    data_TZ: torch.Tensor,
    noise_of: Callable[[int], torch.Tensor],
    documents_T: torch.Tensor,
    is_target_T: torch.Tensor,
    t0: float,
    spread: float,
    draws_T2: torch.Tensor,
    num_levels: int = SPREAD_LEVELS,
) -> DocumentNats:
    """Measure a batch of documents along a path on which every token has a time of its own, down to t0: one column.

    At level s the logit of a token's time is s + its offset, and never below t0's. As dt = t (1 - t) ds, the integral over its own times is
    that of (1 - t)^2 Z L ds over the levels at which it has not arrived. Levels are drawn where that is large: at quantiles
    (k + u) / num_levels of a logistic distribution, over whose density each counts. One uniform u a document makes the sum unbiased.

    Args:
        spread: deviation of the tokens' offsets, e.g. the `time_spread` of training.
        draws_T2: standard normal numbers: each token's offset over `spread`; and where a document's levels lie, by its first target's.
        others: as for `document_nats`; noise_of gets the number of the level, and last that of t0, `num_levels`.
    """
    draws_T2 = draws_T2.double()
    first, scale = math.log(t0 / (1 - t0)), LEVELS_WIDTH * math.hypot(spread, OWN_WIDTH)
    places_M = is_target_T.nonzero()[:, 0]
    begins_N = places_M.new_zeros(int(documents_T.max()) + 1)
    begins_N.scatter_reduce_(0, documents_T[places_M], places_M, "amin", include_self=False)
    # Each document's levels are its own, wherever it is measured.
    uniform_T = torch.special.ndtr(draws_T2[begins_N, 1])[documents_T]
    quantiles_GT = (torch.arange(num_levels, device=uniform_T.device)[:, None] + uniform_T) / num_levels
    logits_GT = max(first, 0.0) + LEVELS_AHEAD + scale * torch.logit(quantiles_GT) + spread * draws_T2[:, 0]
    at_times = [*logits_GT.clamp_min(first).sigmoid(), torch.full_like(uniform_T, t0)]
    errors_GT, cross_entropies_GT = _measured(denoise, data_TZ, noise_of, at_times)
    between_GT = scale / (num_levels * quantiles_GT * (1 - quantiles_GT))
    on_the_way_GT = between_GT * (logits_GT > first) * (1 - logits_GT.sigmoid()).square()
    flow_T = (on_the_way_GT * errors_GT[:-1]).sum(0)
    return _by_document((t0,), flow_T[None], cross_entropies_GT[-1:], documents_T, is_target_T)


def _measured(
    denoise: Denoiser, data_TZ: torch.Tensor, noise_of: Callable[[int], torch.Tensor], at_times: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared errors of the velocity, summed over channels, and nats of the true tokens, both float64 [G, T]."""
    errors, cross_entropies = [], []
    for i, time_T in enumerate(at_times):
        noise_TZ = noise_of(i)
        time_T = time_T.to(data_TZ.dtype)
        velocity_TZ, nats_T = denoise(flow.interpolate(data_TZ, noise_TZ, time_T[:, None]), time_T)
        errors.append((velocity_TZ - flow.velocity(data_TZ, noise_TZ)).double().square().sum(-1))
        cross_entropies.append(nats_T.double())
    return torch.stack(errors), torch.stack(cross_entropies)


def _by_document(
    times: tuple[float, ...],
    flow_GT: torch.Tensor,
    cross_entropies_GT: torch.Tensor,
    documents_T: torch.Tensor,
    is_target_T: torch.Tensor,
) -> DocumentNats:
    """Sums over each document's targets, where there are any."""
    num = int(documents_T.max()) + 1
    documents_T = documents_T[is_target_T]

    def summed(values_GT: torch.Tensor) -> torch.Tensor:
        return values_GT.new_zeros(num, len(times)).index_add(0, documents_T, values_GT[:, is_target_T].T).cpu()

    tokens_N = torch.bincount(documents_T, minlength=num).cpu()
    return DocumentNats(times, summed(flow_GT), summed(cross_entropies_GT), tokens_N)[tokens_N > 0]


def denoiser(
    vae: TextVAE,
    dit: TextDiT,
    context_TZ: torch.Tensor,
    targets: TokenTargets,
    windows: Segments,
    segments: Segments,
) -> Denoiser:
    """A TextDiT as `document_nats` calls it. Tokens are as probable as its head says, else as the VAE's decoder on the one-step estimate.

    Args:
        context_TZ: standardised latents at the contexts, zeros where there is none.
        targets: the true tokens and where they stand.
        windows: context and target of a document together; segments: each by itself, as the VAE encodes them.
    """
    is_target_T = torch.zeros(len(context_TZ), dtype=torch.bool, device=context_TZ.device)
    is_target_T[targets.places_M] = True
    shown_TZ = context_TZ * ~is_target_T[:, None]

    def denoise(noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> Denoised:
        inputs_TZ = torch.where(is_target_T[:, None], noisy_TZ, shown_TZ)
        estimate_TZ = None
        if dit.config.self_conditioning:
            first_TZ = dit(inputs_TZ, is_target_T, time_T, windows, targets=targets).velocity_TZ.to(inputs_TZ.device)
            estimate_TZ = dit.estimate(first_TZ, inputs_TZ, time_T)
        found = dit(inputs_TZ, is_target_T, time_T, windows, estimate_TZ, targets).to(inputs_TZ.device)
        nats_M = found.token_ce_M
        if nats_M is None:
            estimate_TZ = dit.estimate(found.velocity_TZ, inputs_TZ, time_T)
            decoded_TZ = vae.unstandardize(torch.where(is_target_T[:, None], estimate_TZ, shown_TZ))
            nats_M = _decoder_nats(
                vae, vae.decode(decoded_TZ, segments).to(targets.places_M.device)[targets.places_M], targets.tokens_M
            )
        nats_M = nats_M.to(inputs_TZ.device)
        return Denoised(found.velocity_TZ, nats_M.new_zeros(len(inputs_TZ)).index_copy(0, targets.places_M, nats_M))

    return denoise


def told_latents(dit: TextDiT, latents_TZ: torch.Tensor, targets: TokenTargets) -> torch.Tensor:
    """The standardised latents [T, Z] from which a model's bound is measured: at targets their tokens' means where its head knows them."""
    if not isinstance(dit.head, CategoricalHead):
        return latents_TZ
    means_MZ = dit.head.means.to(targets.tokens_M.device)[targets.tokens_M]
    return latents_TZ.index_copy(0, targets.places_M, means_MZ.to(latents_TZ))


def _decoder_nats(vae: TextVAE, hidden_MD: torch.Tensor, tokens_M: torch.Tensor) -> torch.Tensor:
    """Cross-entropies [M] of the VAE's LM head."""
    hidden_MD, tokens_M = hidden_MD.to(vae.lm_head.weight.device), tokens_M.to(vae.lm_head.weight.device)
    no_rows = (
        hidden_MD.new_zeros(len(x), 0, dtype=torch.float32) for x in (hidden_MD, vae.lm_head.weight, vae.lm_head.weight)
    )
    known_ME, known_VE, values_VZ = no_rows
    scores = ClassScores(hidden_MD, vae.lm_head.weight, known_ME, known_VE)
    return categorical_loss(scores, values_VZ, tokens_M)[1]


def target_nats(
    vae: TextVAE,
    dit: TextDiT,
    contexts: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    noise: Sequence[torch.Tensor],
    t0: float,
    spread: float = 0.0,
    draws: Sequence[torch.Tensor] = (),
) -> DocumentNats:
    """Measure targets given their contexts, each encoded by itself: the bound at t0, in the first column.

    Args:
        contexts, targets: int64 tokens of each document; a context may be empty.
        noise: of each document, [G, its target's tokens, Z]; G times from t0 on.
        spread, draws: if not 0, of a path on which each token has a time of its own, see `spread_nats`; [its target's tokens, 2] of each
            document.
    """
    device = vae.latents_mean.device
    encoded = zip(encode_each(vae, contexts), encode_each(vae, targets))
    pieces = [(piece, is_target) for pair in encoded for piece, is_target in zip(pair, (False, True))]
    is_target_T = torch.cat([torch.full((len(piece),), is_target) for piece, is_target in pieces]).to(device)
    latents_TZ = torch.cat([piece for piece, _ in pieces])
    windows = Segments.from_lengths([len(c) + len(x) for c, x in zip(contexts, targets)], device)
    segments = Segments.from_lengths([len(piece) for piece, _ in pieces if len(piece)], device)
    named = TokenTargets(is_target_T.nonzero()[:, 0], torch.cat(list(targets)).to(device))

    def noise_of(index: int) -> torch.Tensor:
        noise_TZ = torch.zeros_like(latents_TZ)
        noise_TZ[named.places_M] = torch.cat([eps_GTZ[index] for eps_GTZ in noise]).to(latents_TZ)
        return noise_TZ

    denoise = denoiser(vae, dit, latents_TZ, named, windows, segments)
    num_times, given = len(noise[0]), (told_latents(dit, latents_TZ, named), noise_of, windows.ids_T, is_target_T)
    if not spread:
        return document_nats(denoise, *given, time_grid(num_times, t0))
    draws_T2 = torch.zeros(len(latents_TZ), 2, device=device)
    draws_T2[named.places_M] = torch.cat(list(draws)).to(draws_T2)
    return spread_nats(denoise, *given, t0, spread, draws_T2, num_times - 1)


def bound_at(documents: DocumentNats, index: int) -> Bound:
    """The bound at the grid's time `index`, fixed beforehand or chosen on other documents."""
    tokens = int(documents.tokens_N.sum())
    nats, error = per_token(documents.bounds_NG[:, index], documents.tokens_N)
    ce = documents.cross_entropies_NG[:, index].sum().item() / tokens
    return Bound(nats, error, documents.times[index], ce, nats - ce, tokens, len(documents))


def least_bound(documents: DocumentNats) -> Bound:
    """The bound at the best t0 of each half of the documents (every second one), reported on the other half: no document chooses its own.

    With one document, at the grid's last time.
    """
    if len(documents) < 2:
        return bound_at(documents, len(documents.times) - 1)
    halves = documents[0::2], documents[1::2]
    return together([(half, other.best) for half, other in zip(halves, halves[::-1])])


def together(parts: Sequence[tuple[DocumentNats, int]]) -> Bound:
    """The bound over several sets of documents, each at the time of its own that its index names: all hold, so their sum does."""
    found = [bound_at(documents, index) for documents, index in parts]
    nats_N = torch.cat([documents.bounds_NG[:, index] for documents, index in parts])
    nats, error = per_token(nats_N, torch.cat([documents.tokens_N for documents, _ in parts]))
    tokens = sum(b.tokens for b in found)
    ce = sum(b.cross_entropy * b.tokens for b in found) / tokens
    return Bound(nats, error, sum(b.t0 for b in found) / len(found), ce, nats - ce, tokens, len(nats_N))


def per_token(nats_N: torch.Tensor, tokens_N: torch.Tensor) -> tuple[float, float]:
    """Nats a token over all documents, and its standard error over documents (of a ratio; NaN for one document).

    For a paired difference of two measurements of the same documents give the documents' differences.
    """
    total, num = float(tokens_N.sum()), len(tokens_N)
    mean = float(nats_N.sum()) / total
    if num < 2:
        return mean, math.nan
    variance = (nats_N - mean * tokens_N).square().sum().item() * num / (num - 1)
    return mean, math.sqrt(variance) / total
