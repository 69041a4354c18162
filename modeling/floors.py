"""Floors of the flow loss: what predictors reach that know no language, and so the yardsticks of a run (docs/diagnosis.md).

blind       knows that channels have unit variance; closed form, `flow.blind_floor`
covariance  knows how channels correlate; closed form, `flow.covariance_floor`
unigram     knows the vocabulary but no neighbours: the Bayes denoiser of one token's latent under a mixture of per-token
            Gaussians, diagonal in the channels, estimated by sampling. Language begins below it.
strict_unigram
            the same, diagonal in the eigenbasis of the covariance within tokens. Near t = 0 it can be half of the unigram floor,
            so that a gain there proves language only below this one.

Shape letters: M sampled tokens, Z latent dim, C mixture components, G grid of times, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass

import torch

from . import flow
from .token_statistics import MIN_VARIANCE, within_token_moments

GRID_POINTS = 32
PRIOR_COUNT = 4
"""Occurrences that the pooled variance counts for, beside a token's own: seen five times, it would else look sharper than it is."""


@dataclass(frozen=True)
class TokenMixture:
    """Gaussians of the standardised latents of each frequent token, plus one that all rarer tokens share (the last)."""

    log_weights_C: torch.Tensor
    means_CZ: torch.Tensor
    variances_CZ: torch.Tensor

    @classmethod
    def fit(
        cls, latents_MZ: torch.Tensor, tokens_M: torch.Tensor, max_components: int = 4096, min_count: int = 5
    ) -> "TokenMixture":
        """Weights, means and diagonal variances of at most `max_components` tokens seen `min_count` times or more."""
        counts_V = torch.bincount(tokens_M)
        order_V = counts_V.argsort(descending=True, stable=True)
        num_own = min(max_components, int((counts_V >= min_count).sum()))
        component_V = torch.full_like(counts_V, num_own)
        component_V[order_V[:num_own]] = torch.arange(num_own, device=counts_V.device)
        component_M = component_V[tokens_M]
        latents_MZ = latents_MZ.double()
        counts_C1 = torch.bincount(component_M, minlength=num_own + 1).double()[:, None]
        zeros_CZ = latents_MZ.new_zeros(num_own + 1, latents_MZ.shape[1])
        means_CZ = zeros_CZ.index_add(0, component_M, latents_MZ) / counts_C1.clamp_min(1)
        residuals_MZ = latents_MZ - means_CZ[component_M]
        squares_CZ = zeros_CZ.index_add(0, component_M, residuals_MZ.square())
        # Shrunk towards the pooled variance, by `PRIOR_COUNT`.
        pooled_Z = residuals_MZ.square().mean(0)
        variances_CZ = (squares_CZ + PRIOR_COUNT * pooled_Z) / (counts_C1 + PRIOR_COUNT)
        seen_C = counts_C1[:, 0] > 0
        log_weights_C = (counts_C1[seen_C, 0] / counts_C1.sum()).log()
        return cls(log_weights_C, means_CZ[seen_C], variances_CZ[seen_C].clamp_min(MIN_VARIANCE))

    def denoise(self, noisy_MZ: torch.Tensor, time: float) -> torch.Tensor:
        """E[z | z_t] under the mixture."""
        precision_CZ = 1 / ((1 - time) ** 2 * self.variances_CZ + time**2)
        shifted_CZ = (1 - time) * self.means_CZ
        distances_MC = (
            noisy_MZ.square() @ precision_CZ.T
            - 2 * noisy_MZ @ (shifted_CZ * precision_CZ).T
            + (shifted_CZ.square() * precision_CZ).sum(-1)
        )
        log_joint_MC = self.log_weights_C + 0.5 * precision_CZ.log().sum(-1) - 0.5 * distances_MC
        posterior_MC = log_joint_MC.softmax(-1)
        gain_CZ = (1 - time) * self.variances_CZ * precision_CZ
        return posterior_MC @ (self.means_CZ - gain_CZ * shifted_CZ) + (posterior_MC @ gain_CZ) * noisy_MZ


@dataclass(frozen=True)
class Floors:
    """Flow loss per channel of the predictors on a grid of times, and the share of variance that tokens do not explain."""

    times_G: torch.Tensor
    blind_G: torch.Tensor
    covariance_G: torch.Tensor
    unigram_G: torch.Tensor
    strict_unigram_G: torch.Tensor
    within_token_variance: float

    def to(self, device: torch.device | str) -> "Floors":
        """With its tensors on the device, where `at` then copies nothing."""
        grids = {f"{name}_G": getattr(self, f"{name}_G").to(device) for name in ("times", *NAMES)}
        return dataclasses.replace(self, **grids)

    def at(self, time_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each floor at the given times (linear between grid points), fp32, named as in the class."""
        return {name: self._interpolate(getattr(self, f"{name}_G"), time_T) for name in NAMES}

    def _interpolate(self, values_G: torch.Tensor, time_T: torch.Tensor) -> torch.Tensor:
        times_G, values_G = (x.to(time_T.device, torch.float32) for x in (self.times_G, values_G))
        time_T = time_T.float().clamp(times_G[0], times_G[-1])
        right_T = torch.searchsorted(times_G, time_T).clamp(1, len(times_G) - 1)
        left_T = right_T - 1
        share_T = (time_T - times_G[left_T]) / (times_G[right_T] - times_G[left_T])
        return torch.lerp(values_G[left_T], values_G[right_T], share_T)


NAMES = ("blind", "covariance", "unigram", "strict_unigram")


def measure_floors(
    latents_MZ: torch.Tensor, tokens_M: torch.Tensor, num_samples: int = 4096, max_components: int = 4096, seed: int = 0
) -> Floors:
    """Floors of standardised latents.

    Args:
        latents_MZ, tokens_M: target tokens and their latents; the mixture and the covariance are fitted to all but the last
            `num_samples` (at most a quarter) of them, and the unigram floor is measured on these.
    """
    num_samples = min(num_samples, len(tokens_M) // 4)
    if num_samples < 1:
        raise ValueError(f"floors need at least 4 target tokens, found {len(tokens_M)}")
    latents_MZ = latents_MZ.double()
    fitted_MZ, clean_MZ, fitted_tokens_M = latents_MZ[:-num_samples], latents_MZ[-num_samples:], tokens_M[:-num_samples]
    mixture = TokenMixture.fit(fitted_MZ, fitted_tokens_M, max_components)
    # Unit noise and squared errors are the same in every orthonormal basis.
    _, _, within_ZZ = within_token_moments(fitted_MZ, fitted_tokens_M, int(tokens_M.max()) + 1)
    basis_ZZ = torch.linalg.eigh(within_ZZ).eigenvectors
    rotated = TokenMixture.fit(fitted_MZ @ basis_ZZ, fitted_tokens_M, max_components)
    generator = torch.Generator(latents_MZ.device).manual_seed(seed)
    noise_MZ = torch.randn(clean_MZ.shape, generator=generator, dtype=torch.float64, device=latents_MZ.device)
    times_G = (torch.arange(GRID_POINTS, dtype=torch.float64, device=latents_MZ.device) + 0.5) / GRID_POINTS
    covariance_ZZ = torch.atleast_2d(torch.cov(fitted_MZ.T))
    eigenvalues_Z = torch.linalg.eigvalsh(covariance_ZZ).clamp_min(0)
    within = (mixture.log_weights_C.exp()[:, None] * mixture.variances_CZ).sum(0).mean() / fitted_MZ.var(0).mean()
    return Floors(
        times_G,
        flow.blind_floor(times_G),
        flow.covariance_floor(times_G, eigenvalues_Z / eigenvalues_Z.mean()),
        _denoising_losses(mixture, clean_MZ, noise_MZ, times_G),
        _denoising_losses(rotated, clean_MZ @ basis_ZZ, noise_MZ @ basis_ZZ, times_G),
        float(within),
    )


def _denoising_losses(
    mixture: TokenMixture, clean_MZ: torch.Tensor, noise_MZ: torch.Tensor, times_G: torch.Tensor
) -> torch.Tensor:
    """Flow loss [G] of the mixture's denoiser."""
    losses = []
    for time in times_G.tolist():
        estimate_MZ = mixture.denoise(flow.interpolate(clean_MZ, noise_MZ, torch.tensor(time)), time)
        losses.append(flow.loss_of_data_error((estimate_MZ - clean_MZ).square().mean(), torch.tensor(time)))
    return torch.stack(losses).to(times_G)
