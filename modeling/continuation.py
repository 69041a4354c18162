"""Continuations of contexts in latent space: packed windows from noise to the latents of their targets, and to tokens.

The one place where contexts, noise and the guided flow are put together: the exported model, the texts of held-out evaluations and the
diagnosis all sample by it.

Shape letters: T packed tokens, N target tokens of all windows, Z latent dim.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .attention import Segments
from .guidance import GuidedVelocity
from .solvers import OnStep, Solver, integrate
from .text_dit import TextDiT
from .text_vae import TextVAE


def sample_targets(
    vae: TextVAE,
    dit: TextDiT,
    contexts: Sequence[torch.Tensor],
    noise: Sequence[torch.Tensor],
    times: Sequence[float],
    *,
    solver: str | Solver = "euler",
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    token_temperature: float = 1.0,
    on_step: OnStep | None = None,
    offsets: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Standardised latents [N, Z] of the targets of all windows, window after window, drawn together.

    Args:
        vae: with the latents' statistics of the DiT set.
        contexts: int64 tokens of each window's context; may be empty.
        noise: of each window's target, [its tokens, Z].
        times: falling from 1 to 0, e.g. `TimeDistribution.grid(50)`.
        solver, guidance_scale, guidance_interval, token_temperature: see `integrate` and `GuidedVelocity`.
        on_step: called with (step, t, one-step estimate of the targets' latents [N, Z]) in every step.
        offsets: for tokens that have times of their own, of the logit of each target token's time, [its tokens] of each window; some are
            then decided before their neighbours, as a model trained with `time_spread` has learned to.
    """
    device = vae.latents_mean.device
    encoded = encode_each(vae, contexts)
    noise = [eps_TZ.to(device, torch.float32) for eps_TZ in noise]
    pairs = list(zip(encoded, noise, strict=True))
    # Each is zero where the other is.
    context_TZ = torch.cat([part for one, eps in pairs for part in (one, torch.zeros_like(eps))])
    noise_TZ = torch.cat([part for one, eps in pairs for part in (torch.zeros_like(one), eps)])
    is_target_T = torch.cat([part for one, eps in pairs for part in (_flags(one, False), _flags(eps, True))])
    windows = Segments.from_lengths([len(one) + len(eps) for one, eps in pairs], device)
    velocity = GuidedVelocity(
        dit, context_TZ, is_target_T, windows, guidance_scale, guidance_interval, token_temperature
    )

    def report(step: int, t: float, estimate_TZ: torch.Tensor) -> None:
        assert on_step is not None
        on_step(step, t, estimate_TZ[is_target_T])

    offsets_T1 = None
    if offsets is not None:
        offsets_T1 = noise_TZ.new_zeros(len(noise_TZ), 1)
        offsets_T1[is_target_T, 0] = torch.cat(list(offsets)).to(offsets_T1)
    return integrate(velocity, noise_TZ, times, solver, report if on_step else None, offsets_T1)[is_target_T]


def decode_targets(vae: TextVAE, latents_NZ: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
    """The int64 tokens of each target, on the CPU, from the standardised latents of all."""
    tokens_N = vae.decode_tokens(latents_NZ, Segments.from_lengths(lengths, latents_NZ.device))
    return list(tokens_N.cpu().split(list(lengths)))


def draw_tokens(
    vae: TextVAE,
    dit: TextDiT,
    contexts: Sequence[torch.Tensor],
    noise: Sequence[torch.Tensor],
    times: Sequence[float],
    *,
    patience: int | None = None,
    on_step: Callable[[int, float, list[torch.Tensor]], None] | None = None,
    **options: Any,
) -> list[torch.Tensor]:
    """The int64 tokens of each window's target, on the CPU.

    Args:
        patience: a target is done when its estimates have decoded to the same tokens in so many steps running, whatever else is in the
            batch, and sampling ends when all are: decoding each step costs less than the steps that are saved, or it does not pay.
        on_step: called with (step, t, tokens of each target as decoded from the one-step estimate) in every step.
        options: the other arguments of `sample_targets`.
    """
    lengths = [len(eps_TZ) for eps_TZ in noise]
    done: dict[int, torch.Tensor] = {}
    last: list[torch.Tensor] = []
    same = [0] * len(lengths)

    def look(step: int, t: float, estimate_NZ: torch.Tensor) -> None:
        nonlocal last
        tokens = [done.get(i, ids_T) for i, ids_T in enumerate(decode_targets(vae, estimate_NZ, lengths))]
        if on_step is not None:
            on_step(step, t, tokens)
        if patience is None:
            return
        for i, ids_T in enumerate(tokens):
            same[i] = same[i] + 1 if last and torch.equal(ids_T, last[i]) else 1
            if same[i] >= patience:
                done[i] = ids_T
        last = tokens
        if len(done) == len(lengths):
            raise _AllDone

    watched = look if on_step is not None or patience is not None else None
    try:
        latents_NZ = sample_targets(vae, dit, contexts, noise, times, on_step=watched, **options)
    except _AllDone:
        return [done[i] for i in range(len(lengths))]
    return [done.get(i, ids_T) for i, ids_T in enumerate(decode_targets(vae, latents_NZ, lengths))]


class _AllDone(Exception):
    """No target changes any more: the way out of a solver, of whatever kind."""


def encode_each(vae: TextVAE, texts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Standardised latents fp32 [tokens, Z] of each text's int64 tokens, encoded by itself; a text may be empty."""
    lengths, device = [len(tokens_T) for tokens_T in texts], vae.latents_mean.device
    if not sum(lengths):
        return [vae.latents_mean.new_zeros(0, vae.config.latent_dim, dtype=torch.float32) for _ in texts]
    segments = Segments.from_lengths([length for length in lengths if length], device)
    latents_TZ = vae.standardize(vae.encode(torch.cat(list(texts)).to(device), segments)[0])
    return list(latents_TZ.split(lengths))


def _flags(part_TZ: torch.Tensor, value: bool) -> torch.Tensor:
    return torch.full((len(part_TZ),), value, dtype=torch.bool, device=part_TZ.device)
