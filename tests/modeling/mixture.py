"""Data whose denoiser is known: mixtures of diagonal Gaussians.

Shape letters: M samples, C components, Z latent dim.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mixture:
    """Logarithms of the components' weights, their means and variances, float64."""

    log_weights_C: torch.Tensor
    means_CZ: torch.Tensor
    variances_CZ: torch.Tensor

    def denoise(self, noisy_MZ: torch.Tensor, time: float) -> torch.Tensor:
        """E[z | z_t]."""
        spreads_CZ = (1 - time) ** 2 * self.variances_CZ + time**2
        rests_MCZ = noisy_MZ[:, None] - (1 - time) * self.means_CZ
        logs_MC = self.log_weights_C - 0.5 * (rests_MCZ**2 / spreads_CZ + spreads_CZ.log()).sum(-1)
        estimates_MCZ = self.means_CZ + (1 - time) * self.variances_CZ / spreads_CZ * rests_MCZ
        return (logs_MC.softmax(-1)[..., None] * estimates_MCZ).sum(1)
