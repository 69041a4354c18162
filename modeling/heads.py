"""Heads of the TextDiT: from the Transformer's output to a velocity, and where a head knows tokens, their cross-entropy.

A head of the TextDiT is a module with two methods. `alone` says what each noisy latent tells by itself, before the network has read any, or
None; `forward` makes the prediction. Time t is [T, 1], fp32, and 0 at contexts. What costs V a token is done for targets alone, where the
network reads no embedding of tokens.

Shape letters: T packed tokens, M target tokens, D width, Z latent dim, V vocabulary, E = 2 Z + 1.
"""

from typing import NamedTuple

import torch
from torch import nn

from .layers import KeepsStatistics, initialize
from .losses import ClassScores, categorical_loss, class_mean, known_mean


class TokenTargets(NamedTuple):
    """Where the target tokens stand, int64 [M], and which they are, int64 [M]."""

    places_M: torch.Tensor
    tokens_M: torch.Tensor


class Own(NamedTuple):
    """What each latent tells by itself.

    Attributes:
        estimate_TZ: E[z | z_t] of the target tokens, fp32, zero elsewhere.
        embedding_TD: the learned embedding of each token, averaged over which it may be, in its weights' dtype; zero where the latent is,
            as those of dropped contexts are. None where the network reads none.
    """

    estimate_TZ: torch.Tensor
    embedding_TD: torch.Tensor | None = None


class Prediction(NamedTuple):
    """What a TextDiT puts out.

    Attributes:
        velocity_TZ: fp32; only the target positions mean anything.
        hidden_TD: the Transformer's output, after its final norm.
        token_loss: sum of the true tokens' cross-entropies in nats, where a head knows tokens and was given the true ones.
        token_ce_M: each one's, without a gradient.
    """

    velocity_TZ: torch.Tensor
    hidden_TD: torch.Tensor
    token_loss: torch.Tensor | None = None
    token_ce_M: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Prediction":
        """All of it on one device: a model may be split over several."""
        return Prediction._make(part if part is None else part.to(device) for part in self)


class VelocityHead(nn.Module):
    """The paper's: a linear map to the velocity."""

    def __init__(self, width: int, latent_dim: int):
        super().__init__()
        self.to_latent = nn.Linear(width, latent_dim)
        self.to_latent.zero_init = True  # type: ignore[assignment]

    def alone(
        self,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        places_M: torch.Tensor,
        embedding_VD: torch.Tensor | None = None,
    ) -> None:
        """Nothing: all that it knows is in the network."""

    def forward(
        self,
        hidden_TD: torch.Tensor,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        places_M: torch.Tensor,
        tokens_M: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> Prediction:
        """The velocity alone."""
        return Prediction(self.to_latent(hidden_TD).float(), hidden_TD)


class CategoricalHead(KeepsStatistics):
    """Probabilities of tokens, and the velocity that follows from them (CDCD, arXiv 2211.15089; Plaid's output prior, 2305.18619).

    A token's latents are a Gaussian around its mean m_k, with variances d per channel that all tokens share. Then the logarithm of the
    density of z_t is linear in what is known of the token, and the network adds its own logits from the context:

        logits_k = h . W_k + (1-t) z_t / S . m_k - (1-t)^2 / (2 S) . m_k^2 + log f_k,    S = (1-t)^2 d + t^2
        m        = sum_k softmax_k(logits) m_k + sqrt(d) (A h + b)                       the second a shift within the token
        v        = ((t - (1-t) d) z_t - t m) / S,                                        that is (z_t - E[z | z_t]) / t

    With a network that says nothing it is Bayes' denoiser of one token by itself, whose bound (likelihood.py) is the unigram entropy.
    Logits of all tokens never exist (losses.py), so that V may be 151,936. What is known is computed in fp32, also under autocast: near
    t = 0 the density's logarithm is a difference of large numbers.

    Buffers are those of token_statistics.py. `through_mean`: whether the velocity's loss reaches the logits; else they learn by the
    cross-entropy alone, and the logits are computed once instead of twice.
    """

    log_frequencies: torch.Tensor
    means: torch.Tensor
    within_variance: torch.Tensor

    def __init__(self, width: int, latent_dim: int, vocab_size: int):
        super().__init__()
        self.through_mean = False
        self.to_logits = nn.Linear(width, vocab_size, bias=False)
        self.to_logits.zero_init = True  # type: ignore[assignment]
        self.to_shift = nn.Linear(width, latent_dim)
        self.to_shift.zero_init = True  # type: ignore[assignment]
        self.register_buffer("log_frequencies", torch.zeros(vocab_size))
        self.register_buffer("means", torch.zeros(vocab_size, latent_dim))
        self.register_buffer("within_variance", torch.ones(latent_dim))

    def alone(
        self,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        places_M: torch.Tensor,
        embedding_VD: torch.Tensor | None = None,
    ) -> Own:
        """What Bayes' rule says of each token by its own latent: its latent's mean, and of an embedding of tokens the mean of that.

        Only the embedding gets a gradient. With it, what is read is averaged in its dtype: the network rounds to it anyway.
        """
        means_VZ = self.means.float()
        if embedding_VD is None:
            known_ME, known_VE = self._known(latents_TZ[places_M].to(means_VZ), time_T1[places_M].to(means_VZ))
            mean_MZ, embedding_TD = known_mean(known_ME, known_VE, means_VZ), None
        else:
            known_TE, known_VE = self._known(latents_TZ.to(means_VZ), time_T1.to(means_VZ))
            values_VX = torch.cat((means_VZ.to(embedding_VD), embedding_VD), -1)
            mean_TZ, embedding_TD = known_mean(known_TE, known_VE, values_VX).split(
                (means_VZ.shape[1], embedding_VD.shape[1]), -1
            )
            mean_MZ = mean_TZ.detach()[places_M].to(means_VZ)
            embedding_TD = embedding_TD * (latents_TZ != 0).any(-1, keepdim=True).to(embedding_TD.device)
        return Own(self._estimate(latents_TZ, time_T1, places_M, mean_MZ), embedding_TD)

    @torch.no_grad()
    def _estimate(
        self, latents_TZ: torch.Tensor, time_T1: torch.Tensor, places_M: torch.Tensor, mean_MZ: torch.Tensor
    ) -> torch.Tensor:
        """E[z | z_t] fp32 [T, Z] at the targets, zero elsewhere, by the mean of which tokens they may be."""
        noisy_MZ, signal_M1 = latents_TZ[places_M].to(mean_MZ), 1 - time_T1[places_M].to(mean_MZ)
        within_Z = self.within_variance.float()
        gain_MZ = signal_M1 * within_Z / (signal_M1.square() * within_Z + (1 - signal_M1).square())
        estimate_MZ = mean_MZ + gain_MZ * (noisy_MZ - signal_M1 * mean_MZ)
        return torch.zeros_like(latents_TZ, dtype=torch.float32).index_copy(
            0, places_M, estimate_MZ.to(latents_TZ.device)
        )

    def forward(
        self,
        hidden_TD: torch.Tensor,
        latents_TZ: torch.Tensor,
        time_T1: torch.Tensor,
        places_M: torch.Tensor,
        tokens_M: torch.Tensor | None = None,
        temperature: float = 1.0,
    ) -> Prediction:
        """Velocity, and given the true tokens their cross-entropies.

        temperature: divides all logits; below 1, sampling is sharpened, and so are the probabilities that a student learns.
        """
        hidden_MD = hidden_TD[places_M]
        noisy_MZ, time_M1 = latents_TZ[places_M].float(), time_T1[places_M]
        within_Z, signal_M1 = self.within_variance.float(), 1 - time_M1
        scores = ClassScores(hidden_MD, self.to_logits.weight, *self._known(noisy_MZ, time_M1))
        loss = ce_M = None
        if tokens_M is None:
            mean_MZ = class_mean(scores, self.means.float(), temperature)
        else:
            scores = scores.divided(temperature)
            loss, ce_M, mean_MZ = categorical_loss(scores, self.means.float(), tokens_M, self.through_mean)
        mean_MZ = mean_MZ + within_Z.sqrt() * self.to_shift(hidden_MD.to(self.to_shift.weight.dtype)).float()
        spread_MZ = signal_M1.square() * within_Z + time_M1.square()
        velocity_MZ = ((time_M1 - signal_M1 * within_Z) * noisy_MZ - time_M1 * mean_MZ) / spread_MZ
        velocity_TZ = torch.zeros_like(latents_TZ, dtype=torch.float32).index_copy(0, places_M, velocity_MZ)
        return Prediction(velocity_TZ, hidden_TD, loss, ce_M)

    def _known(self, noisy_MZ: torch.Tensor, time_M1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two factors [M, E] and [V, E] of log f_k + log N(z_t; (1-t) m_k, S), up to what all tokens have in common."""
        signal_M1, means_VZ = 1 - time_M1, self.means.float()
        precision_MZ = 1 / (signal_M1.square() * self.within_variance.float() + time_M1.square())
        known_ME = torch.cat(
            (signal_M1 * precision_MZ * noisy_MZ, -0.5 * signal_M1.square() * precision_MZ, torch.ones_like(time_M1)),
            -1,
        )
        return known_ME, torch.cat((means_VZ, means_VZ.square(), self.log_frequencies.float()[:, None]), -1)


class TokenHead(nn.Linear):
    """Logits of the target tokens from the hidden states, for an auxiliary cross-entropy where the head knows none; never exported."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__(width, vocab_size, bias=False)
        initialize(self)
