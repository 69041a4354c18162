"""ODE solvers of the flow, dz/dt = v(z, t), from noise to data: one function each over a falling grid of times.

A time is one number for all tokens, or float64 [T, 1] where each has its own; all begin at 1 and end at 0 together.

Shape letters: T packed tokens, Z latent dim.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch

from . import flow
from .times import move_logit

Time = float | torch.Tensor
"""t of all tokens, or of each, float64 [T, 1]."""
Velocity = Callable[[torch.Tensor, Any], torch.Tensor]
"""v(z_TZ, t) -> [T, Z], for a `Time` t."""
OnStep = Callable[[int, float, torch.Tensor], None]
"""Called with (step, t of the grid, one-step estimate of z [T, Z])."""

GROUP = "textldm.solvers"
"""Entry points by which installed packages add a `Solver`."""


@dataclass(frozen=True)
class Solver:
    """A way to follow the flow.

    Attributes:
        name: by which configurations and commands ask for it.
        order: p of its error O(h^p) for steps of length h.
        evaluations: of the velocity a step, the first of them at the step's own z and t. The last step may need fewer.
        solve: called with (velocity, z_TZ at times[0], falling times) gives z_TZ at times[-1].
    """

    name: str
    order: int
    evaluations: int
    solve: Callable[[Velocity, torch.Tensor, Sequence[Any]], torch.Tensor]


def euler(velocity: Velocity, z_TZ: torch.Tensor, times: Sequence[Any]) -> torch.Tensor:
    """Straight ahead along the velocity at the step's beginning."""
    for t, s in itertools.pairwise(times):
        z_TZ = z_TZ + (s - t) * velocity(z_TZ, t)
    return z_TZ


def heun(velocity: Velocity, z_TZ: torch.Tensor, times: Sequence[Any]) -> torch.Tensor:
    """Along the mean of the velocities at the beginning and at Euler's end; Euler in a step to t = 0, where no velocity is trained."""
    for t, s in itertools.pairwise(times):
        slope_TZ = velocity(z_TZ, t)
        if not _is_data(s):
            slope_TZ = 0.5 * (slope_TZ + velocity(z_TZ + (s - t) * slope_TZ, s))
        z_TZ = z_TZ + (s - t) * slope_TZ
    return z_TZ


def multistep(velocity: Velocity, z_TZ: torch.Tensor, times: Sequence[Any]) -> torch.Tensor:
    """Exact for an estimate of z that is linear in t.

    A step goes ahead with the estimate's slope over the step before; the evaluation at its end gives the slope over this step, with
    which it is done over (predictor and corrector, as in UniPC, arXiv 2302.04867).
    """
    begin: tuple[Any, torch.Tensor, torch.Tensor] | None = None
    trend_TZ = torch.zeros_like(z_TZ)
    for t, s in itertools.pairwise(times):
        data_TZ = flow.data_from_velocity(z_TZ, velocity(z_TZ, t), t)
        if begin is not None:
            earlier_t, earlier_z_TZ, earlier_data_TZ = begin
            trend_TZ = (data_TZ - earlier_data_TZ) / (t - earlier_t)
            z_TZ = _with_trend(earlier_z_TZ, earlier_data_TZ, trend_TZ, earlier_t, t)
        begin = t, z_TZ, data_TZ
        z_TZ = _with_trend(z_TZ, data_TZ, trend_TZ, t, s)
    return z_TZ


def _is_data(t: Time) -> bool:
    return not t.any() if torch.is_tensor(t) else t == 0


def _with_trend(z_TZ: torch.Tensor, data_TZ: torch.Tensor, trend_TZ: torch.Tensor, t: Any, s: Any) -> torch.Tensor:
    """z_s of dz/dtau = (z - x) / tau for the estimate x = data + (tau - t) trend; at s = 0, where no trend would be safe, data itself."""
    if _is_data(s):
        return data_TZ
    log = torch.log(t / s) if torch.is_tensor(t) else math.log(t / s)
    return (s / t) * z_TZ + (1 - s / t) * data_TZ + (s * log - (t - s)) * trend_TZ


SOLVERS = {
    solver.name: solver
    for solver in (Solver("euler", 1, 1, euler), Solver("heun", 2, 2, heun), Solver("multistep", 2, 1, multistep))
}
"""Ours by name."""


def solver_names() -> list[str]:
    """Ours first, then those of installed packages."""
    return [*SOLVERS, *sorted(set(entry_points(group=GROUP).names) - SOLVERS.keys())]


def find_solver(name: str) -> Solver:
    """The solver of that name. Raises: ValueError for a name that nobody gave."""
    if name in SOLVERS:
        return SOLVERS[name]
    for point in entry_points(group=GROUP, name=name):
        return point.load()
    raise ValueError(f"solver {name!r} is unknown; expected one of {', '.join(solver_names())}")


def integrate(
    velocity: Velocity,
    noise_TZ: torch.Tensor,
    times: Sequence[float],
    solver: str | Solver = "euler",
    on_step: OnStep | None = None,
    offsets_T1: torch.Tensor | None = None,
) -> torch.Tensor:
    """Follow dz/dt = v(z, t) from noise at times[0] to data at times[-1].

    Args:
        velocity: v(z_TZ, t).
        times: falling, e.g. `TimeDistribution.grid(50)`.
        solver: a name (`find_solver`) or a `Solver` itself.
        on_step: called with (step, t, one-step estimate of z) in every step.
        offsets_T1: of the logit of each token's time from that of the grid's, [T, 1]; the velocity is then called with times of all tokens.

    Raises: ValueError for an unknown solver, times that do not fall, or a solver whose steps begin elsewhere than it declares.
    """
    solver = find_solver(solver) if isinstance(solver, str) else solver
    if any(late <= early for late, early in itertools.pairwise(times)):
        raise ValueError(f"times must fall from noise to data, found {[round(t, 4) for t in times[:6]]} ...")
    evaluated = itertools.count()
    own_times: Sequence[Any] = times
    if offsets_T1 is not None:
        grid = torch.tensor(times, dtype=torch.float64, device=noise_TZ.device)
        own_times = [move_logit(t, offsets_T1.double()) for t in grid]

    def watched(z_TZ: torch.Tensor, t: Time) -> torch.Tensor:
        """The velocity; the first evaluation of a step is reported."""
        velocity_TZ = velocity(z_TZ.to(noise_TZ.dtype), t)
        step, within = divmod(next(evaluated), solver.evaluations)
        if not within:
            place = min(step, len(times) - 1)
            if not torch.equal(torch.as_tensor(t), torch.as_tensor(own_times[place])):
                raise ValueError(
                    f"solver {solver.name} began step {step} at t = {float(torch.as_tensor(t).mean()):g}, which is not that step's time in"
                    f" the grid: as it declares {solver.evaluations} evaluations a step, the first of every {solver.evaluations} must be"
                    " there"
                )
            if on_step is not None:
                on_step(step, times[place], flow.data_from_velocity(z_TZ, velocity_TZ, t).to(noise_TZ.dtype))
        return velocity_TZ

    # Tokens' own times are float64, near 1 and 0 too close to each other for less, and so is what is computed with them.
    return solver.solve(watched, noise_TZ, own_times).to(noise_TZ.dtype)
