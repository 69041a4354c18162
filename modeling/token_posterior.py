"""The token posterior: a velocity by Bayes' rule, of which a network supplies only the prior, what neighbours tell of a token.

Latents of one token are close to a Gaussian of their own: mean m_k, variances c_k in the eigenbasis of the covariance within tokens,
in which all of this is written. Given z_t alone, the probability of each token and the best velocity are known in closed form: the
denoiser behind the strict unigram floor (floors.py). The network adds its belief from the context: a number per token to the logits, and
within the token a shift of the Gaussian's mean, beside the offset that all latents of a segment have in common (`offset`):

    p_k = softmax_k(log f_k + log N(z_t; (1-t) m_k, (1-t)^2 c + t^2) + logits_k)         c: the variances of all tokens pooled
    d   = sum_k p_k c_k,   m = sum_k p_k m_k + sqrt(d) (offset + shift),   s = (1-t)^2 r d + t^2
    v   = ((t - (1-t) r d) z_t - t m) / s            r: the share of d that the offset leaves

With zeros from the network the loss lies at the strict unigram floor, up to the pooling, and below it by the offset. Averaging embeddings
by a softmax is the score interpolation of CDCD (arXiv 2211.15089).

Shape letters: T packed tokens, M sampled tokens, G groups of tokens, D width, Z latent dim, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Segments
from .heads import Prediction, TokenTargets
from .layers import Gain

MIN_PRIOR = 1e-9
MIN_VARIANCE = 1e-5
UNSEEN_COUNT = 0.5
MIN_OWN = 0.05
PRIOR_COUNT = 4
"""Occurrences that the pooled variance counts for, beside a token's own: seen five times, it would else look sharper than it is."""


class Estimate(NamedTuple):
    """What z_t alone tells, fp32 [T, Z] each.

    Attributes:
        latents_TZ: E[z | z_t].
        deviation_TZ: E[(z - m) / sqrt(d) | z_t], where in its token's Gaussian the latent lies, in the eigenbasis: all of it at t = 0,
            nothing where noise hides it.
        certainty_TZ: the share of that deviation's variance which z_t tells, (1-t)^2 d / s.
    """

    latents_TZ: torch.Tensor
    deviation_TZ: torch.Tensor
    certainty_TZ: torch.Tensor


class Offset(NamedTuple):
    """What the deviations of each group of tokens have in common, fp32 [G, Z] each, in units of sqrt(d) and d.

    Attributes:
        mean_GZ: its posterior mean from the group's noisy latents.
        prior_GZ: its variance before.
        open_GZ: the share of that which stays open.
    """

    mean_GZ: torch.Tensor
    prior_GZ: torch.Tensor
    open_GZ: torch.Tensor

    def alternate(self) -> tuple["Offset", "Offset"]:
        """Of the even groups and of the odd ones."""
        return Offset(*(x_GZ[0::2] for x_GZ in self)), Offset(*(x_GZ[1::2] for x_GZ in self))


def without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that computes in its inputs' precision: near t = 0, log N(z_t; ...) is a difference of large numbers."""

    @functools.wraps(method)
    def exact(self: nn.Module, first: torch.Tensor, *others: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return method(self, first, *others)

    return exact


class TokenPosterior(nn.Module):
    """Head of a TextDiT: from hidden states and z_t to a velocity and the logits of each token. [T, V] exists.

    All arithmetic is fp32, also under autocast; only the two layers that read the hidden states compute in their weights' precision.
    """

    log_frequencies: torch.Tensor
    means: torch.Tensor
    basis: torch.Tensor
    shared_variance: torch.Tensor
    own_variance: torch.Tensor
    variances: torch.Tensor
    pooled_variances: torch.Tensor

    def __init__(self, width: int, latent_dim: int, vocab_size: int):
        super().__init__()
        self.to_logits = nn.Linear(width, vocab_size, bias=False)
        self.to_logits.zero_init = True  # type: ignore[assignment]
        self.to_shift = nn.Linear(width, latent_dim)
        self.to_shift.zero_init = True  # type: ignore[assignment]
        self.from_context = Gain(latent_dim)
        # The eigenbasis' vectors are the columns of `basis`.
        self.register_buffer("log_frequencies", torch.zeros(vocab_size))
        self.register_buffer("means", torch.zeros(vocab_size, latent_dim))
        self.register_buffer("variances", torch.ones(vocab_size, latent_dim))
        self.register_buffer("pooled_variances", torch.ones(latent_dim))
        self.register_buffer("basis", torch.eye(latent_dim))
        self.register_buffer("shared_variance", torch.zeros(latent_dim))
        self.register_buffer("own_variance", torch.ones(latent_dim))

    @without_autocast
    def unigram_logits(self, noisy_TZ: torch.Tensor, time_T1: torch.Tensor) -> torch.Tensor:
        """log f_k + log N(z_t; ...) up to a constant per position, fp32 [T, V]."""
        signal_T1, means_VZ = 1 - time_T1, self.means.float()
        precision_TZ = 1 / (signal_T1.square() * self.pooled_variances.float() + time_T1.square())
        cross_TV = (signal_T1 * precision_TZ * self._rotate(noisy_TZ)) @ means_VZ.T
        square_TV = (signal_T1.square() * precision_TZ) @ means_VZ.square().T
        return self.log_frequencies.float() + cross_TV - 0.5 * square_TV

    @without_autocast
    def estimate(self, logits_TV: torch.Tensor, noisy_TZ: torch.Tensor, time_T1: torch.Tensor) -> "Estimate":
        """The best estimates from z_t alone, under the token probabilities softmax(logits)."""
        means_TZ, variances_TZ = self._expected(logits_TV)
        spread_TZ = (1 - time_T1).square() * variances_TZ + time_T1.square()
        rest_TZ = self._rotate(noisy_TZ) - (1 - time_T1) * means_TZ
        deviation_TZ = (1 - time_T1) * variances_TZ.sqrt() * rest_TZ / spread_TZ
        latents_TZ = (means_TZ + variances_TZ.sqrt() * deviation_TZ) @ self.basis.float().T
        return Estimate(latents_TZ, deviation_TZ, (1 - time_T1).square() * variances_TZ / spread_TZ)

    def offset(self, alone: Estimate, group_T: torch.Tensor, num_groups: int) -> Offset:
        """What each group's tokens have in common, by Bayes' rule; a group without tokens has the mean 0."""
        own_Z = self.own_variance.float()
        weight_TZ = 1 / (1 - (1 - own_Z) * alone.certainty_TZ)
        sums_GZ = weight_TZ.new_zeros(num_groups, weight_TZ.shape[1])
        counts_G1 = torch.bincount(group_T, minlength=num_groups).clamp_min(1)[:, None]
        prior_GZ = self.shared_variance.float() / counts_G1
        open_GZ = 1 / (1 + prior_GZ * sums_GZ.index_add(0, group_T, weight_TZ * alone.certainty_TZ))
        mean_GZ = prior_GZ * open_GZ * sums_GZ.index_add(0, group_T, weight_TZ * alone.deviation_TZ)
        return Offset(mean_GZ, prior_GZ, open_GZ)

    @without_autocast
    def forward(
        self,
        hidden_TD: torch.Tensor,
        unigram_TV: torch.Tensor,
        noisy_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        belief_scale: float,
        offset_TZ: torch.Tensor,
        rest_TZ: torch.Tensor,
        alone_T: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(velocity fp32 [T, Z], logits of the tokens fp32 [T, V]).

        Args:
            hidden_TD: the Transformer's output; unigram_TV: `unigram_logits` of the same positions.
            noisy_TZ: z_t, standardised; time_T1: t, fp32.
            belief_scale: factor of the network's logits; above 1, sampling is guided away from the predictor without context.
            offset_TZ: a shift that is known without the network; rest_TZ: the share of d that remains beside it.
            alone_T: bool [T], tokens whose shift is that offset and nothing of the network's.
        """
        hidden_TD = hidden_TD.to(self.to_logits.weight.dtype)
        logits_TV = unigram_TV + belief_scale * self.to_logits(hidden_TD).float()
        means_TZ, variances_TZ = self._expected(logits_TV)
        shift_TZ = self.to_shift(hidden_TD).float().masked_fill(alone_T[:, None], 0)
        means_TZ = means_TZ + variances_TZ.sqrt() * (offset_TZ + shift_TZ)
        variances_TZ = variances_TZ * rest_TZ
        spread_TZ = (1 - time_T1).square() * variances_TZ + time_T1.square()
        slope_TZ = time_T1 - (1 - time_T1) * variances_TZ
        velocity_TZ = (slope_TZ * self._rotate(noisy_TZ) - time_T1 * means_TZ) / spread_TZ
        return velocity_TZ @ self.basis.float().T, logits_TV

    def _rotate(self, noisy_TZ: torch.Tensor) -> torch.Tensor:
        return noisy_TZ.float() @ self.basis.float()

    def _expected(self, logits_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variances of the tokens' Gaussians, averaged with softmax(logits), [T, Z] each."""
        both_V2Z = torch.cat((self.means, self.variances), dim=1).float()
        means_TZ, variances_TZ = (logits_TV.softmax(-1) @ both_V2Z).chunk(2, dim=-1)
        return means_TZ, variances_TZ


class Alone(NamedTuple):
    """What the noisy latents tell before the network has read them.

    Attributes:
        latents_TZ: the estimate of z from each z_t by itself.
        unigram_TV: `TokenPosterior.unigram_logits`.
        offset_TZ: what the tokens of a segment have in common; rest_TZ: the share of d that it leaves.
        begins_T: bool, the first token of each target.
    """

    latents_TZ: torch.Tensor
    unigram_TV: torch.Tensor
    offset_TZ: torch.Tensor
    rest_TZ: torch.Tensor
    begins_T: torch.Tensor


class PosteriorHead(TokenPosterior):
    """The token posterior as the head of a TextDiT."""

    def alone(
        self, latents_TZ: torch.Tensor, is_target_T: torch.Tensor, time_T1: torch.Tensor, windows: Segments
    ) -> Alone:
        """Tokens by their frequencies and z_t, and the offset of each segment."""
        with torch.no_grad():
            unigram_TV = self.unigram_logits(latents_TZ, time_T1)
            alone = self.estimate(unigram_TV, latents_TZ, time_T1)
            # A dropped context, all zeros, tells nothing.
            dropped_T1 = (latents_TZ == 0).all(-1, keepdim=True)
            told = alone._replace(deviation_TZ=alone.deviation_TZ.masked_fill(dropped_T1, 0))
            # An encoder's attention moves the latents of all that it sees at once together: a target's, and apart from them its context's.
            groups_T, num_groups = 2 * windows.ids_T + is_target_T, 2 * len(windows.lengths)
            context, target = self.offset(told, groups_T, num_groups).alternate()
        # What the target leaves open of its own, the context may tell.
        hint_WZ = context.mean_GZ * (target.prior_GZ / context.prior_GZ.clamp_min(MIN_PRIOR)).sqrt()
        offset_WZ = target.mean_GZ + target.open_GZ * self.from_context(hint_WZ)
        rest_WZ = self.own_variance.float() + target.open_GZ * target.prior_GZ
        begins_T = begins_target(is_target_T, windows)
        return Alone(alone.latents_TZ, unigram_TV, offset_WZ[windows.ids_T], rest_WZ[windows.ids_T], begins_T)

    def forward(  # type: ignore[override]
        self,
        hidden_TD: torch.Tensor,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        alone: Alone,
        belief_scale: float,
        targets: TokenTargets | None,
    ) -> Prediction:
        """Velocity and cross-entropies."""
        velocity_TZ, logits_TV = super().forward(
            hidden_TD,
            alone.unigram_TV,
            latents_TZ,
            time_T1,
            belief_scale,
            alone.offset_TZ,
            alone.rest_TZ,
            alone.begins_T,
        )
        if targets is None:
            return Prediction(velocity_TZ, hidden_TD)
        ce_T = F.cross_entropy(logits_TV, targets.tokens_T, reduction="none")
        return Prediction(velocity_TZ, hidden_TD, (ce_T * targets.weights_T).sum(), ce_T.detach())


def begins_target(is_target_T: torch.Tensor, windows: Segments) -> torch.Tensor:
    """bool [T]: the first token of each target.

    What stands before it was encoded apart from it: it tells which token follows, but nothing of where in its token's Gaussian the
    latent lies. To the network it looks like any neighbour, and misleads it (docs/decisions/diffusion.md).
    """
    goes_on_T = is_target_T.roll(1) & (windows.positions_T > 0)
    return is_target_T & ~goes_on_T


def within_token_moments(
    latents_MZ: torch.Tensor, tokens_M: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Occurrences [V], mean latent of each token [V, Z] (zero without any), and the covariance within tokens [Z, Z], unbiased."""
    counts_V = torch.bincount(tokens_M, minlength=vocab_size).double()
    sums_VZ = latents_MZ.new_zeros(vocab_size, latents_MZ.shape[1]).index_add(0, tokens_M, latents_MZ)
    means_VZ = sums_VZ / counts_V.clamp_min(1)[:, None]
    within_MZ = latents_MZ - means_VZ[tokens_M]
    # A mean takes one degree of freedom of its token's occurrences.
    freedom = max(len(tokens_M) - int((counts_V > 0).sum()), 1)
    return counts_V, means_VZ, within_MZ.T @ within_MZ / freedom


def offset_variance(deviations_MZ: torch.Tensor, segments_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(a, o), [Z] each: deviations of a segment of n tokens have the variance a / n of an offset common to all, and o of their own.

    An encoder's attention adds a mean over its n tokens, whose variance falls as 1 / n. By moments: products of pairs, and squares.
    """
    counts_S = torch.bincount(segments_M).to(deviations_MZ)
    sums_SZ = deviations_MZ.new_zeros(len(counts_S), deviations_MZ.shape[1]).index_add(0, segments_M, deviations_MZ)
    squares_Z = deviations_MZ.square().sum(0)
    shared_Z = (sums_SZ.square().sum(0) - squares_Z) / (counts_S - 1).clamp_min(0).sum().clamp_min(1)
    shared_Z = shared_Z.clamp_min(0)
    own_Z = (squares_Z - shared_Z * (counts_S > 0).sum()) / len(deviations_MZ)
    return shared_Z, own_Z.clamp_min(MIN_OWN)


def token_statistics(
    latents_MZ: torch.Tensor, tokens_M: torch.Tensor, segments_M: torch.Tensor, vocab_size: int
) -> dict[str, torch.Tensor]:
    """The buffers of a `TokenPosterior`, by name, from standardised latents of the training text; double precision inside.

    segments_M: the segment of each latent, from 0. A token that the sample lacks gets the mean zero, the pooled variances and the frequency
    of half an occurrence.
    """
    latents_MZ = latents_MZ.double()
    counts_V, means_VZ, covariance_ZZ = within_token_moments(latents_MZ, tokens_M, vocab_size)
    pooled_Z, basis_ZZ = torch.linalg.eigh(covariance_ZZ)
    pooled_Z = pooled_Z.clamp_min(MIN_VARIANCE)
    squares_MZ = ((latents_MZ - means_VZ[tokens_M]) @ basis_ZZ).square()
    squares_VZ = torch.zeros_like(means_VZ).index_add(0, tokens_M, squares_MZ)
    weights_V = counts_V + UNSEEN_COUNT
    variances_VZ = (squares_VZ + PRIOR_COUNT * pooled_Z) / (counts_V[:, None] + PRIOR_COUNT)
    deviations_MZ = (latents_MZ - means_VZ[tokens_M]) @ basis_ZZ / variances_VZ[tokens_M].sqrt()
    shared_Z, own_Z = offset_variance(deviations_MZ, segments_M)
    statistics = {
        "shared_variance": shared_Z,
        "own_variance": own_Z,
        "log_frequencies": (weights_V / weights_V.sum()).log(),
        "means": means_VZ @ basis_ZZ,
        "variances": variances_VZ,
        "pooled_variances": pooled_Z,
        "basis": basis_ZZ,
    }
    return {name: tensor.float().contiguous() for name, tensor in statistics.items()}
