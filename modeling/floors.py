"""Floors of the flow loss: what predictors reach that know no language, as lines beside a run's own (docs/diagnosis.md).

blind       knows that channels have unit variance, `flow.blind_floor`
covariance  knows how channels correlate, `flow.covariance_floor`

Whether a model knows more than which tokens are frequent is measured in nats (likelihood.py).

Shape letters: T packed tokens, M sampled tokens, Z latent dim.
"""

from dataclasses import dataclass, replace

import torch

from . import flow
from .token_statistics import within_token_moments

NAMES = ("blind", "covariance")


@dataclass(frozen=True)
class Floors:
    """What they depend on.

    Attributes:
        eigenvalues_Z: of the latents' covariance, with mean 1.
        within_token_variance: the share of the latents' variance that tokens do not explain.
    """

    eigenvalues_Z: torch.Tensor
    within_token_variance: float

    def to(self, device: torch.device | str) -> "Floors":
        """With its tensor on the device."""
        return replace(self, eigenvalues_Z=self.eigenvalues_Z.to(device))

    def at(self, time_T: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each floor at the given times, by name, in their precision."""
        covariance_T = flow.covariance_floor(time_T, self.eigenvalues_Z.to(time_T))
        return {"blind": flow.blind_floor(time_T), "covariance": covariance_T}


def measure_floors(latents_MZ: torch.Tensor, tokens_M: torch.Tensor) -> Floors:
    """Floors of standardised latents of sampled tokens, in double precision. Raises: ValueError for fewer than four of them."""
    if len(tokens_M) < 4:
        raise ValueError(f"floors need at least 4 target tokens, found {len(tokens_M)}")
    latents_MZ = latents_MZ.double()
    covariance_ZZ = torch.atleast_2d(torch.cov(latents_MZ.T))
    eigenvalues_Z = torch.linalg.eigvalsh(covariance_ZZ).clamp_min(0)
    _, _, within_ZZ = within_token_moments(latents_MZ, tokens_M, int(tokens_M.max()) + 1)
    within = within_ZZ.diagonal().sum() / covariance_ZZ.diagonal().sum()
    return Floors(eigenvalues_Z / eigenvalues_Z.mean(), float(within))
