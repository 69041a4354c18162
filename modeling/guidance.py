"""The velocity that sampling follows: a DiT's on packed windows, under classifier-free guidance.

Shape letters: T packed tokens, Z latent dim.
"""

import functools

import torch

from .attention import Segments
from .heads import Own
from .text_dit import TextDiT


def guide(conditional_TZ: torch.Tensor, unconditional_TZ: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598): scale 1 is the conditional velocity, 0 the unconditional one."""
    return unconditional_TZ + scale * (conditional_TZ - unconditional_TZ)


def _with_and_without_contexts(own: Own, is_target_T1: torch.Tensor) -> Own:
    """Of both branches' latents: the targets' are the same, and in the second one contexts are zeros."""
    embedding_TD = own.embedding_TD
    if embedding_TD is not None:
        embedding_TD = torch.cat((embedding_TD, embedding_TD * is_target_T1.to(embedding_TD.device)))
    return Own(own.estimate_TZ.repeat(2, 1), embedding_TD)


class GuidedVelocity:
    """The DiT's velocity of packed windows under classifier-free guidance, self-conditioning on its own last estimate.

    Args:
        latents_TZ: standardised latents of the contexts; whatever stands at the targets is replaced by z_t.
        is_target_T: bool [T]; windows: which tokens see each other.
        guidance_scale: 1 is no guidance (and half the work), 0 unconditional.
        guidance_interval: (low, high) times between which guidance is applied (arXiv 2404.07724); conditional elsewhere.
        token_temperature: of the tokens' probabilities, below 1 sharper; only with the categorical head.
        places_M: of the targets, where the host knows them. No device is then waited for, and with times of each token's own guidance is
            computed in every step, also where none of them lies in the interval. Else they are found, once.

    Raises: ValueError for a token_temperature that is not positive, or other than 1 with another head.
    """

    def __init__(
        self,
        dit: TextDiT,
        latents_TZ: torch.Tensor,
        is_target_T: torch.Tensor,
        windows: Segments,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        token_temperature: float = 1.0,
        places_M: torch.Tensor | None = None,
    ):
        if token_temperature <= 0 or (token_temperature != 1 and dit.config.head != "categorical"):
            raise ValueError(
                f"token_temperature is {token_temperature:g}; expected more than 0, and 1 with this DiT's head {dit.config.head}: only"
                " the categorical head has probabilities to sharpen"
            )
        self._dit, self._windows, self._is_target_T = dit, windows, is_target_T
        self._context_TZ = latents_TZ * ~is_target_T[:, None]
        self._scale, self._interval, self._temperature = guidance_scale, guidance_interval, token_temperature
        self._estimate_TZ: torch.Tensor | None = None
        self._may_wait = places_M is None
        self._places_M = is_target_T.nonzero()[:, 0] if places_M is None else places_M

    @functools.cached_property
    def _both(self) -> tuple[torch.Tensor, torch.Tensor, Segments]:
        """Which are targets, their places, and the windows, of both branches: those with their contexts, then those without."""
        num = len(self._is_target_T)
        windows = Segments.from_lengths(self._windows.lengths * 2, self._windows.device)
        return self._is_target_T.repeat(2), torch.cat((self._places_M, self._places_M + num)), windows

    def __call__(self, z_TZ: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
        """Velocity [T, Z] at the targets, zero at the contexts, at a time of all tokens or of each, [T, 1]."""
        is_target_T1 = self._is_target_T[:, None]
        noisy_TZ = z_TZ * is_target_T1
        time_T = t[:, 0].float() if torch.is_tensor(t) else torch.full((len(z_TZ),), t, device=z_TZ.device)
        inside = (self._interval[0] <= t) & (t <= self._interval[1])
        guided = self._scale != 1.0 and self._any(inside)
        inputs_TZ, places_M, estimate_TZ = noisy_TZ + self._context_TZ, self._places_M, self._estimate_TZ
        target_T, windows, own = self._is_target_T, self._windows, None
        if guided:
            own = self._dit.alone(inputs_TZ, time_T[:, None] * is_target_T1, places_M)
            own = None if own is None else _with_and_without_contexts(own, is_target_T1)
            estimate_TZ = None if estimate_TZ is None else estimate_TZ.repeat(2, 1)
            inputs_TZ, time_T = torch.cat((inputs_TZ, noisy_TZ)), time_T.repeat(2)
            target_T, places_M, windows = self._both
        found = self._dit(inputs_TZ, target_T, time_T, windows, estimate_TZ, None, self._temperature, places_M, own)
        velocity_TZ = found.velocity_TZ.to(z_TZ.device)
        if guided:
            conditional_TZ, unconditional_TZ = velocity_TZ.split(len(z_TZ))
            guided_TZ = guide(conditional_TZ, unconditional_TZ, self._scale)
            velocity_TZ = torch.where(inside, guided_TZ, conditional_TZ) if torch.is_tensor(inside) else guided_TZ
        if self._dit.config.self_conditioning:
            self._estimate_TZ = self._dit.estimate(velocity_TZ, z_TZ, time_T[: len(z_TZ)])
        return velocity_TZ * is_target_T1

    def _any(self, inside: bool | torch.Tensor) -> bool:
        """Whether guidance is applied to any token."""
        return bool(inside.any()) if torch.is_tensor(inside) and self._may_wait else inside is not False
