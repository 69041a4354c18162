"""Texts of several requests drawn in one packed call; each is a function of its own prompt, seed and settings.

Shape letters: N new tokens of all texts, Z latent dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from modeling.continuation import decode_targets, sample_targets
from modeling.textldm import TextLDM
from modeling.times import TimeDistribution


@dataclass(frozen=True)
class Settings:
    """What all texts of a packed call have in common; see `TextLDM.generate`."""

    num_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    solver: str
    grid: str
    token_temperature: float


@dataclass(frozen=True)
class Draw:
    """A text to be drawn: choice `choice` of a prompt's continuations, of `num_new` tokens, from the noise of (seed, choice)."""

    prompt: tuple[int, ...]
    num_new: int
    seed: int
    choice: int
    settings: Settings

    @property
    def num_tokens(self) -> int:
        """Of the window that it is."""
        return len(self.prompt) + self.num_new


class Abandoned(Exception):
    """Nobody waits for any text of this call any more."""


Watch = Callable[[int, float, list[int]], None]
"""Called with (step, t, tokens as decoded from the one-step estimate)."""


class Sampler:
    """Packed calls of one model, from one thread."""

    def __init__(self, model: TextLDM):
        self.model = model

    @torch.inference_mode()
    def draw(
        self,
        draws: Sequence[Draw],
        watched: Sequence[Watch | None],
        abandoned: Callable[[], bool] = lambda: False,
    ) -> list[list[int]]:
        """The new tokens of each, end-of-text not cut off.

        Args:
            draws: of the same settings.
            watched: by whom each text is watched on its way from noise.
            abandoned: asked in every step.

        Raises: Abandoned.
        """
        vae, settings = self.model.vae, draws[0].settings
        times = TimeDistribution(**self.model.config.times)
        lengths = [one.num_new for one in draws]
        places = [place for place, watch in enumerate(watched) if watch is not None]

        def report(step: int, t: float, estimate_NZ: torch.Tensor) -> None:
            if abandoned():
                raise Abandoned
            if not places:
                return
            parts = estimate_NZ.split(lengths)
            tokens = decode_targets(
                vae, torch.cat([parts[place] for place in places]), [lengths[place] for place in places]
            )
            for place, ids in zip(places, tokens):
                watch = watched[place]
                assert watch is not None
                watch(step, t, ids.tolist())

        latents_NZ = sample_targets(
            vae,
            self.model.dit,
            [torch.tensor(one.prompt, dtype=torch.long) for one in draws],
            [self.model.keyed_noise(one.seed, one.choice, one.num_new) for one in draws],
            times.grid(settings.num_steps, settings.grid).tolist(),
            solver=settings.solver,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            token_temperature=settings.token_temperature,
            on_step=report,
            offsets=[
                times.spread * self.model.keyed_noise(one.seed, -1 - one.choice, one.num_new)[:, 0] for one in draws
            ]
            if times.spread
            else None,
        )
        return [ids.tolist() for ids in decode_targets(vae, latents_NZ, lengths)]
