"""Time runs from data to noise: t = 0 is data, t = 1 is noise. This file is the only home of the flow's equations.

    z_t = (1 - t) z + t eps,   v* = dz_t/dt = eps - z,   so   z = z_t - t v   and   eps = z_t + (1 - t) v

Where a time may be one number for all tokens it is a float or a scalar tensor. Which times are drawn or stepped through: times.py.

Shape letters: T packed tokens, Z latent dim, L eigenvalues.
"""

import torch

MIN_TIME = 0.02
"""`TextDiT.estimate` takes a smaller time for this one."""


def interpolate(data_TZ: torch.Tensor, noise_TZ: torch.Tensor, time_T1: torch.Tensor | float) -> torch.Tensor:
    """z_t on the straight path from data to noise."""
    return (1 - time_T1) * data_TZ + time_T1 * noise_TZ


def velocity(data_TZ: torch.Tensor, noise_TZ: torch.Tensor) -> torch.Tensor:
    """v*, the regression target; constant along the path."""
    return noise_TZ - data_TZ


def data_from_velocity(
    noisy_TZ: torch.Tensor, velocity_TZ: torch.Tensor, time_T1: torch.Tensor | float
) -> torch.Tensor:
    """The one-step estimate of z."""
    return noisy_TZ - time_T1 * velocity_TZ


def blind_floor(time: torch.Tensor) -> torch.Tensor:
    """Flow loss per channel of the best linear predictor that knows only unit variance: F(t) = 2 - (2t-1)^2 / (t^2 + (1-t)^2)."""
    return covariance_floor(time, torch.ones(1, dtype=time.dtype, device=time.device))


def covariance_floor(time: torch.Tensor, eigenvalues_L: torch.Tensor) -> torch.Tensor:
    """Flow loss per channel of the best linear predictor that knows the latents' covariance, given its eigenvalues (mean 1)."""
    t, eigenvalue = time[..., None], eigenvalues_L
    explained = (t - (1 - t) * eigenvalue) ** 2 / (t**2 + (1 - t) ** 2 * eigenvalue)
    return (1 + eigenvalue - explained).mean(-1)
