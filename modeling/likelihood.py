"""An upper bound on -log p(target tokens | context) of a latent diffusion model, in nats, comparable with any language model's.

For every time t0 in (0, 1], with z_t = (1 - t) z + t eps, SNR(t) = ((1 - t) / t)^2 and the flow loss L(t) per channel,

    -log p(x | c)  <=  E[-log p(x | z_t0, c)]  +  integral from t0 to 1 of (1 - t) / t * Z * L(t) dt

The first part is the cross-entropy of any decoder that is a distribution. The second is KL(q(z_t0 | x) || p(z_t0 | c)), half the integral
of -dSNR/dt E|z - z_hat|^2 (VDM, arXiv 2107.00630; Plaid, 2305.18619), written in velocities: z_hat - z = t (v* - v_hat). Nothing is left at
t = 1, which is pure noise; no noise of the encoder and no cut-off at t = 0 come in. The least over a grid of t0 counts.

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
from .heads import TokenTargets
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


class Denoised(NamedTuple):
    """What a model makes of noisy latents: a velocity fp32 [T, Z], and the nats of every true token, [T], which count at targets alone."""

    velocity_TZ: torch.Tensor
    nats_T: torch.Tensor


Denoiser = Callable[[torch.Tensor, float], Denoised]
"""Called with (z_t [T, Z], t)."""


@dataclass(frozen=True)
class DocumentNats:
    """What was measured of each document, on the CPU; times are those of a rising grid that ends at 1.

    Attributes:
        times: G of them.
        errors_NG: squared error of the velocity, summed over channels and target tokens.
        cross_entropies_NG: nats of the true tokens given z_t and the context, summed over target tokens.
        tokens_N: number of target tokens, > 0.
    """

    times: tuple[float, ...]
    errors_NG: torch.Tensor
    cross_entropies_NG: torch.Tensor
    tokens_N: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence["DocumentNats"]) -> "DocumentNats":
        """All documents of several measurements on one grid."""
        if not parts or any(part.times != parts[0].times for part in parts):
            raise ValueError(f"expected measurements on one grid of times, found {len({p.times for p in parts})} grids")
        columns = zip(*((part.errors_NG, part.cross_entropies_NG, part.tokens_N) for part in parts))
        return cls(parts[0].times, *(torch.cat(column) for column in columns))

    def __getitem__(self, chosen: slice | torch.Tensor) -> "DocumentNats":
        """Some of the documents."""
        return DocumentNats(self.times, self.errors_NG[chosen], self.cross_entropies_NG[chosen], self.tokens_N[chosen])

    def __len__(self) -> int:
        return len(self.tokens_N)

    @functools.cached_property
    def flow_parts_NG(self) -> torch.Tensor:
        """The integral from each time to 1, in nats a document."""
        times_G = torch.tensor(self.times, dtype=torch.float64)
        return ((1 - times_G) / times_G * self.errors_NG) @ quadrature(self.times).T

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
    """Measure a batch of documents at every time; those without a target token are left out.

    Args:
        denoise: the model, with the context in it; called once a time with all positions noised.
        data_TZ: clean latents.
        noise_of: standard normal noise [T, Z] of the i-th time. Of another key for each it makes the sum over times less noisy.
        documents_T: int64 [T], each token's document, from 0; is_target_T: bool [T], what counts.
    """
    num = int(documents_T.max()) + 1
    places_T, documents_T = is_target_T.nonzero()[:, 0], documents_T[is_target_T]

    def summed(values_T: torch.Tensor) -> torch.Tensor:
        values_T = values_T[places_T].double()
        return values_T.new_zeros(num).index_add(0, documents_T, values_T).cpu()

    errors, cross_entropies = [], []
    for i, t in enumerate(times):
        noise_TZ = noise_of(i)
        velocity_TZ, nats_T = denoise(flow.interpolate(data_TZ, noise_TZ, t), t)
        errors.append(summed((velocity_TZ - flow.velocity(data_TZ, noise_TZ)).double().square().sum(-1)))
        cross_entropies.append(summed(nats_T))
    tokens_N = torch.bincount(documents_T, minlength=num).cpu()
    found = DocumentNats(times, torch.stack(errors, 1), torch.stack(cross_entropies, 1), tokens_N)
    return found[tokens_N > 0]


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

    def denoise(noisy_TZ: torch.Tensor, t: float) -> Denoised:
        inputs_TZ = torch.where(is_target_T[:, None], noisy_TZ, shown_TZ)
        time_T = torch.full((len(inputs_TZ),), t, device=inputs_TZ.device)
        estimate_TZ = None
        if dit.config.self_conditioning:
            first_TZ = dit(inputs_TZ, is_target_T, time_T, windows, targets=targets).velocity_TZ
            estimate_TZ = dit.estimate(first_TZ, inputs_TZ, time_T)
        found = dit(inputs_TZ, is_target_T, time_T, windows, estimate_TZ, targets)
        nats_M = found.token_ce_M
        if nats_M is None:
            estimate_TZ = dit.estimate(found.velocity_TZ, inputs_TZ, time_T)
            decoded_TZ = vae.unstandardize(torch.where(is_target_T[:, None], estimate_TZ, shown_TZ))
            nats_M = _decoder_nats(vae, vae.decode(decoded_TZ, segments)[targets.places_M], targets.tokens_M)
        return Denoised(found.velocity_TZ, nats_M.new_zeros(len(inputs_TZ)).index_copy(0, targets.places_M, nats_M))

    return denoise


def _decoder_nats(vae: TextVAE, hidden_MD: torch.Tensor, tokens_M: torch.Tensor) -> torch.Tensor:
    """Cross-entropies [M] of the VAE's LM head."""
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
    times: tuple[float, ...],
) -> DocumentNats:
    """Measure targets given their contexts, each encoded by itself.

    Args:
        contexts, targets: int64 tokens of each document; a context may be empty.
        noise: of each document, [G, its target's tokens, Z].
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
    return document_nats(denoise, latents_TZ, noise_of, windows.ids_T, is_target_T, times)


def bound_at(documents: DocumentNats, index: int) -> Bound:
    """The bound at the grid's time `index`, fixed beforehand or chosen on other documents."""
    tokens = int(documents.tokens_N.sum())
    nats, error = per_token(documents.bounds_NG[:, index], documents.tokens_N)
    ce = documents.cross_entropies_NG[:, index].sum().item() / tokens
    return Bound(nats, error, documents.times[index], ce, nats - ce, tokens, len(documents))


def least_bound(documents: DocumentNats) -> Bound:
    """The bound at the best t0 of each half of the documents (every second one), reported on the other half: no document chooses its own.

    Both halves' bounds hold, so their sum does. With one document, at the grid's last time.
    """
    if len(documents) < 2:
        return bound_at(documents, len(documents.times) - 1)
    halves = documents[0::2], documents[1::2]
    found = [bound_at(half, other.best) for half, other in zip(halves, halves[::-1])]
    nats_N = torch.cat([half.bounds_NG[:, other.best] for half, other in zip(halves, halves[::-1])])
    nats, error = per_token(nats_N, torch.cat([half.tokens_N for half in halves]))
    tokens = sum(b.tokens for b in found)
    ce = sum(b.cross_entropy * b.tokens for b in found) / tokens
    return Bound(nats, error, sum(b.t0 for b in found) / 2, ce, nats - ce, tokens, len(documents))


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


def frequency_nats(counts_V: torch.Tensor) -> torch.Tensor:
    """Float64 [V]: the nats of each token to who knows nothing but how often it occurred; one never seen counts as half a time."""
    weights_V = counts_V.double() + 0.5
    return -(weights_V / weights_V.sum()).log()


def unigram_nats(counts_V: torch.Tensor, tokens_T: torch.Tensor) -> float:
    """Nats a token of tokens under their frequencies alone."""
    return float(frequency_nats(counts_V)[tokens_T].mean())
