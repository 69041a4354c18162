"""Texts of several requests drawn in one call; each is a function of its own prompt, seed and settings.

On CPUs a call's texts are divided among the cores: each draws its part, packed, with one thread, where a single text's operations would be
too small to be shared by all. A call of one text has all cores.

Shape letters: N new tokens of all texts, Z latent dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from data_pipeline.core.threads import in_order
from modeling.beyond_window import block_sizes, latest
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
    """The next block of a text: choice `choice` of a prompt's continuations, of `num_new` tokens, from the noise of (seed, choice).

    One that fits into a window with its prompt is one block; else blocks follow one another as in `TextLDM.generate`, each in a call.

    Attributes:
        window: of the model, in tokens.
        end_id: the token that ends a text.
        found: tokens of the blocks before.
    """

    prompt: tuple[int, ...]
    num_new: int
    seed: int
    choice: int
    settings: Settings
    window: int
    end_id: int | None = None
    found: tuple[int, ...] = ()

    @property
    def place(self) -> tuple[int, int]:
        """Number and tokens of the block."""
        sizes, done = block_sizes(len(self.prompt), self.num_new, self.window), len(self.found)
        number = next(number for number in range(len(sizes)) if sum(sizes[:number]) == done)
        return number, sizes[number]

    @property
    def context(self) -> list[int]:
        """The latest tokens before the block, as many as fill a window with it."""
        return latest([*self.prompt, *self.found], self.place[1], self.window)

    @property
    def num_tokens(self) -> int:
        """Of the window that it is."""
        return len(self.context) + self.place[1]

    def after(self, tokens: Sequence[int]) -> "tuple[Draw, bool]":
        """The text with these tokens of its block, and whether it is whole, of its length or ended."""
        grown = replace(self, found=(*self.found, *tokens))
        return grown, len(grown.found) == self.num_new or self.end_id in tokens


class Abandoned(Exception):
    """Nobody waits for any text of this call any more."""


Watch = Callable[[int, float, list[int]], None]
"""Called with (step, t, the text's new tokens, the block's as decoded from the one-step estimate)."""


def parts_of(draws: Sequence[Draw], num: int) -> list[list[int]]:
    """Places of the texts, dealt out to at most `num` parts of nearly as many tokens each: the longest first, each to the lightest part."""
    parts: list[list[int]] = [[] for _ in range(min(num, len(draws)))]
    tokens = [0] * len(parts)
    for place in sorted(range(len(draws)), key=lambda place: -draws[place].num_tokens):
        lightest = tokens.index(min(tokens))
        parts[lightest].append(place)
        tokens[lightest] += draws[place].num_tokens
    return [sorted(part) for part in parts]


class Sampler:
    """Calls of one model, one at a time."""

    def __init__(self, model: TextLDM):
        self.model = model

    def draw(
        self,
        draws: Sequence[Draw],
        watched: Sequence[Watch | None],
        abandoned: Callable[[], bool] = lambda: False,
    ) -> list[list[int]]:
        """The tokens of each one's block, end-of-text not cut off.

        Args:
            draws: of the same settings.
            watched: by whom each text is watched on its way from noise; in several threads.
            abandoned: asked in every step.

        Raises: Abandoned.
        """
        device = self.model.vae.latents_mean.device
        places = parts_of(draws, torch.get_num_threads() if device.type == "cpu" else 1)
        parts = ([[given[place] for place in part] for part in places] for given in (draws, watched))
        found: dict[int, list[int]] = {}
        for part, texts in zip(
            places, in_order(self._packed, *parts, [abandoned] * len(places), device=device), strict=True
        ):
            found |= zip(part, texts)
        return [found[place] for place in range(len(draws))]

    @torch.inference_mode()
    def _packed(
        self, draws: Sequence[Draw], watched: Sequence[Watch | None], abandoned: Callable[[], bool]
    ) -> list[list[int]]:
        """The same of one part."""
        vae, settings = self.model.vae, draws[0].settings
        times = TimeDistribution(**self.model.config.times)
        blocks = [one.place for one in draws]
        lengths = [size for _, size in blocks]
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
                watch(step, t, [*draws[place].found, *ids.tolist()])

        latents_NZ = sample_targets(
            vae,
            self.model.dit,
            [torch.tensor(one.context, dtype=torch.long) for one in draws],
            [self.model.keyed_noise(one.seed, one.choice, size, block) for one, (block, size) in zip(draws, blocks)],
            times.grid(settings.num_steps, settings.grid).tolist(),
            solver=settings.solver,
            guidance_scale=settings.guidance_scale,
            guidance_interval=settings.guidance_interval,
            token_temperature=settings.token_temperature,
            on_step=report,
            offsets=[
                times.spread * self.model.keyed_noise(one.seed, -1 - one.choice, size, block)[:, 0]
                for one, (block, size) in zip(draws, blocks)
            ]
            if times.spread
            else None,
        )
        return [ids.tolist() for ids in decode_targets(vae, latents_NZ, lengths)]
