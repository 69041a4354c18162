"""The token posterior: a velocity by Bayes' rule, of which a network supplies only the prior, what neighbours tell of a token.

Latents of one token are close to a Gaussian of their own: mean m_k, variances c_k in the eigenbasis of the covariance within tokens,
in which all of this is written. Given z_t alone, the probability of each token and the best velocity are known in closed form: the
denoiser behind the strict unigram floor (floors.py). The network adds its belief from the context: a number per token to the logits, and
within the token a shift of the Gaussian's mean, beside the offset that all latents of a segment have in common (`Estimate.common`):

    p_k = softmax_k(log f_k + log N(z_t; (1-t) m_k, (1-t)^2 c + t^2) + logits_k)         c: the variances of all tokens pooled
    d   = sum_k p_k c_k,   m = sum_k p_k m_k + sqrt(d) (offset + shift),   s = (1-t)^2 d + t^2
    v   = ((t - (1-t) d) z_t - t m) / s

With zeros from the network and no offset the loss is the strict unigram floor, up to the pooling. Averaging embeddings by a softmax is the
score interpolation of CDCD (arXiv 2211.15089).

Shape letters: T packed tokens, M sampled tokens, G groups of tokens, D width, Z latent dim, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import nn

from .layers import Gain

MIN_VARIANCE = 1e-5
UNSEEN_COUNT = 0.5
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

    def common(self, group_T: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The deviation that the tokens of each group have in common, and the share of its variance that stays open, [num_groups, Z] each.

        Where an offset of variance d is added to all of a group's latents, beside each one's own deviation, the first is its posterior
        mean in units of sqrt(d). A group without tokens has 0 and 1.
        """
        sums_GZ = self.deviation_TZ.new_zeros(num_groups, self.deviation_TZ.shape[1])
        open_GZ = 1 / (1 + sums_GZ.index_add(0, group_T, self.certainty_TZ))
        return sums_GZ.index_add(0, group_T, self.deviation_TZ) * open_GZ, open_GZ


class TokenPosterior(nn.Module):
    """Head of a TextDiT: from hidden states and z_t to a velocity and the logits of each token. All arithmetic is fp32, [T, V] exists."""

    log_frequencies: torch.Tensor
    means: torch.Tensor
    basis: torch.Tensor
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

    def unigram_logits(self, noisy_TZ: torch.Tensor, time_T1: torch.Tensor) -> torch.Tensor:
        """log f_k + log N(z_t; ...) up to a constant per position, fp32 [T, V]."""
        signal_T1, means_VZ = 1 - time_T1, self.means.float()
        precision_TZ = 1 / (signal_T1.square() * self.pooled_variances.float() + time_T1.square())
        cross_TV = (signal_T1 * precision_TZ * self._rotate(noisy_TZ)) @ means_VZ.T
        square_TV = (signal_T1.square() * precision_TZ) @ means_VZ.square().T
        return self.log_frequencies.float() + cross_TV - 0.5 * square_TV

    def estimate(self, logits_TV: torch.Tensor, noisy_TZ: torch.Tensor, time_T1: torch.Tensor) -> "Estimate":
        """The best estimates from z_t alone, under the token probabilities softmax(logits)."""
        means_TZ, variances_TZ = self._expected(logits_TV)
        spread_TZ = (1 - time_T1).square() * variances_TZ + time_T1.square()
        rest_TZ = self._rotate(noisy_TZ) - (1 - time_T1) * means_TZ
        deviation_TZ = (1 - time_T1) * variances_TZ.sqrt() * rest_TZ / spread_TZ
        latents_TZ = (means_TZ + variances_TZ.sqrt() * deviation_TZ) @ self.basis.float().T
        return Estimate(latents_TZ, deviation_TZ, (1 - time_T1).square() * variances_TZ / spread_TZ)

    def forward(
        self,
        hidden_TD: torch.Tensor,
        unigram_TV: torch.Tensor,
        noisy_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        belief_scale: float = 1.0,
        offset_TZ: torch.Tensor | None = None,
        alone_T: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(velocity fp32 [T, Z], logits of the tokens fp32 [T, V]).

        Args:
            hidden_TD: the Transformer's output; unigram_TV: `unigram_logits` of the same positions.
            noisy_TZ: z_t, standardised; time_T1: t, fp32.
            belief_scale: factor of the network's logits; above 1, sampling is guided away from the predictor without context.
            offset_TZ: a shift that is known without the network.
            alone_T: bool [T], tokens whose shift is that offset and nothing of the network's.
        """
        logits_TV = unigram_TV + belief_scale * self.to_logits(hidden_TD).float()
        means_TZ, variances_TZ = self._expected(logits_TV)
        shift_TZ = self.to_shift(hidden_TD).float()
        if alone_T is not None:
            shift_TZ = shift_TZ.masked_fill(alone_T[:, None], 0)
        if offset_TZ is not None:
            shift_TZ = shift_TZ + offset_TZ
        means_TZ = means_TZ + variances_TZ.sqrt() * shift_TZ
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


def token_statistics(latents_MZ: torch.Tensor, tokens_M: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
    """The buffers of a `TokenPosterior`, by name, from standardised latents of the training text; double precision inside.

    A token that the sample lacks gets the mean zero, the pooled variances and the frequency of half an occurrence.
    """
    latents_MZ = latents_MZ.double()
    counts_V, means_VZ, covariance_ZZ = within_token_moments(latents_MZ, tokens_M, vocab_size)
    pooled_Z, basis_ZZ = torch.linalg.eigh(covariance_ZZ)
    pooled_Z = pooled_Z.clamp_min(MIN_VARIANCE)
    squares_MZ = ((latents_MZ - means_VZ[tokens_M]) @ basis_ZZ).square()
    squares_VZ = torch.zeros_like(means_VZ).index_add(0, tokens_M, squares_MZ)
    weights_V = counts_V + UNSEEN_COUNT
    statistics = {
        "log_frequencies": (weights_V / weights_V.sum()).log(),
        "means": means_VZ @ basis_ZZ,
        "variances": (squares_VZ + PRIOR_COUNT * pooled_Z) / (counts_V[:, None] + PRIOR_COUNT),
        "pooled_variances": pooled_Z,
        "basis": basis_ZZ,
    }
    return {name: tensor.float().contiguous() for name, tensor in statistics.items()}
