"""Sampling the flow: ODE solvers over any grid of times, and the guided velocity of packed windows.

Shape letters: T packed tokens, Z latent dim, W windows.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch

from . import flow
from .attention import Segments
from .text_dit import TextDiT

SOLVERS = ("euler", "heun", "multistep")

Velocity = Callable[[torch.Tensor, float], torch.Tensor]


def integrate(
    velocity: Velocity,
    noise_TZ: torch.Tensor,
    times: Sequence[float],
    solver: str = "euler",
    on_step: Callable[[int, float, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Follow dz/dt = v(z, t) from noise at times[0] to data at times[-1].

    Args:
        velocity: v(z_TZ, t).
        times: falling, e.g. `TimeDistribution.grid(50)`.
        solver: "euler" (order 1, one evaluation a step), "heun" (order 2, two a step but the last) or "multistep" (order 2, one a
            step): exact for an estimate of z that is linear in t. It goes ahead with the slope of the step before; the evaluation
            there gives the slope of this step, with which the step is done over (predictor and corrector, as in UniPC, arXiv 2302.04867).
        on_step: called with (step, t, one-step estimate of z) in every step.

    Raises: ValueError for an unknown solver or times that do not fall.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r} is unknown; expected one of {', '.join(SOLVERS)}")
    if any(late <= early for late, early in itertools.pairwise(times)):
        raise ValueError(f"times must fall from noise to data, found {[round(t, 4) for t in times[:6]]} ...")
    z_TZ = noise_TZ
    earlier: tuple[torch.Tensor, torch.Tensor, float] | None = None
    trend_TZ = torch.zeros_like(noise_TZ)
    for step, (t, s) in enumerate(itertools.pairwise(times)):
        v_TZ = velocity(z_TZ, t)
        if on_step is not None:
            on_step(step, t, z_TZ - t * v_TZ)
        if solver == "euler":
            z_TZ = z_TZ + (s - t) * v_TZ
        elif solver == "heun":
            ahead_TZ = z_TZ + (s - t) * v_TZ
            slope_TZ = v_TZ if s == 0 else 0.5 * (v_TZ + velocity(ahead_TZ, s))
            z_TZ = z_TZ + (s - t) * slope_TZ
        else:
            data_TZ = z_TZ - t * v_TZ
            if earlier is not None:
                earlier_z_TZ, earlier_data_TZ, earlier_t = earlier
                trend_TZ = (data_TZ - earlier_data_TZ) / (t - earlier_t)
                z_TZ = _follow(earlier_z_TZ, earlier_data_TZ, trend_TZ, earlier_t, t)
            earlier = z_TZ, data_TZ, t
            z_TZ = _follow(z_TZ, data_TZ, trend_TZ, t, s)
    return z_TZ


def _follow(z_TZ: torch.Tensor, data_TZ: torch.Tensor, trend_TZ: torch.Tensor, t: float, s: float) -> torch.Tensor:
    """z_s of dz/dtau = (z - x) / tau for the estimate x = data + (tau - t) trend; at s = 0, where no trend would be safe, data itself."""
    if s == 0:
        return data_TZ
    return (s / t) * z_TZ + (1 - s / t) * data_TZ + (s * math.log(t / s) - (t - s)) * trend_TZ


class GuidedVelocity:
    """The DiT's velocity of packed windows under classifier-free guidance, self-conditioning on its own last estimate.

    Args:
        latents_TZ: standardised latents of the contexts; whatever stands at the targets is replaced by z_t.
        is_target_T: bool [T]; windows: which tokens see each other.
        guidance_scale: 1 is no guidance (and half the work), 0 unconditional.
        guidance_interval: (low, high) times between which guidance is applied (arXiv 2404.07724); conditional elsewhere.
        belief_scale: guidance of another kind, against the predictor without context, at no cost; only with posterior prediction.

    Raises: ValueError for a belief_scale other than 1 of a DiT without posterior prediction.
    """

    def __init__(
        self,
        dit: TextDiT,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        windows: Segments,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        belief_scale: float = 1.0,
    ):
        if belief_scale != 1 and dit.posterior is None:
            raise ValueError(
                f"belief_scale is {belief_scale:g}, but this DiT predicts {dit.config.prediction}: only posterior prediction has"
                " beliefs to scale; leave it at 1"
            )
        self._dit, self._windows, self._is_target_T = dit, windows, is_target_T
        self._context_TZ = latents_TZ * ~is_target_T[:, None]
        self._scale, self._interval, self._belief_scale = guidance_scale, guidance_interval, belief_scale
        self._estimate_TZ: torch.Tensor | None = None

    def __call__(self, z_TZ: torch.Tensor, t: float) -> torch.Tensor:
        """Velocity [T, Z] at the targets, zero at the contexts."""
        is_target_T1 = self._is_target_T[:, None]
        noisy_TZ = z_TZ * is_target_T1
        guided = self._scale != 1.0 and self._interval[0] <= t <= self._interval[1]
        inputs_TZ, target_T, windows, estimate_TZ = (
            noisy_TZ + self._context_TZ,
            self._is_target_T,
            self._windows,
            self._estimate_TZ,
        )
        if guided:
            inputs_TZ = torch.cat((inputs_TZ, noisy_TZ))
            target_T = target_T.repeat(2)
            windows = Segments.from_lengths(windows.lengths * 2, windows.device)
            estimate_TZ = None if estimate_TZ is None else estimate_TZ.repeat(2, 1)
        time_T = torch.full(target_T.shape, t, device=z_TZ.device)
        velocity_TZ = self._dit(inputs_TZ, target_T, time_T, windows, estimate_TZ, self._belief_scale)
        if guided:
            velocity_TZ = flow.guide(velocity_TZ[: len(z_TZ)], velocity_TZ[len(z_TZ) :], self._scale)
            time_T = time_T[: len(z_TZ)]
        if self._dit.config.self_conditioning:
            self._estimate_TZ = self._dit.estimate(velocity_TZ, z_TZ, time_T)
        return velocity_TZ * is_target_T1
