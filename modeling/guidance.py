"""The velocity that sampling follows: a DiT's on packed windows, under classifier-free guidance.

Shape letters: T packed tokens, Z latent dim.
"""

import torch

from .attention import Segments
from .text_dit import TextDiT


def guide(conditional_TZ: torch.Tensor, unconditional_TZ: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598): scale 1 is the conditional velocity, 0 the unconditional one."""
    return unconditional_TZ + scale * (conditional_TZ - unconditional_TZ)


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
        if belief_scale != 1 and dit.config.prediction != "posterior":
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
        velocity_TZ = self._dit(inputs_TZ, target_T, time_T, windows, estimate_TZ, self._belief_scale).velocity_TZ
        if guided:
            velocity_TZ = guide(velocity_TZ[: len(z_TZ)], velocity_TZ[len(z_TZ) :], self._scale)
            time_T = time_T[: len(z_TZ)]
        if self._dit.config.self_conditioning:
            self._estimate_TZ = self._dit.estimate(velocity_TZ, z_TZ, time_T)
        return velocity_TZ * is_target_T1
