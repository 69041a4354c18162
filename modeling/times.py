"""Which times the flow is trained at and sampled through: a distribution, its quantiles as a grid, and a grid measured on a model.

Time runs from data to noise, as in flow.py. Shape letters: T packed tokens, Z latent dim.
"""

import itertools
import math
from dataclasses import dataclass

import torch

GRIDS = ("training", "even", "uniform")


@dataclass(frozen=True, kw_only=True)
class TimeDistribution:
    """Density of t in training, and the sampling schedule: its quantile function maps uniform numbers to times.

    Attributes:
        kind: "logit_normal": logit(t) ~ N(mean, std^2), or "uniform".
        mean, std: of the logit; the paper has std 1.5 (Sec. 3, TextLDM).
        shift: t -> shift t / (1 + (shift - 1) t), moves mass towards noise for > 1, as larger latents need (arXiv 2403.03206, Eq. 23).
        spread: deviation of the logits of a window's tokens' times about the window's, each token having a time of its own; 0: one for all.
        path: `EstimatePath.even_times` of a trained model, for the even grid.
    """

    kind: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.5
    shift: float = 1.0
    spread: float = 0.0
    path: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("logit_normal", "uniform"):
            raise ValueError(f"time distribution {self.kind!r} is unknown; expected logit_normal or uniform")
        if self.std <= 0 or self.shift <= 0 or self.spread < 0:
            raise ValueError(
                f"time std and shift must be positive, spread at least 0, found {self.std}, {self.shift} and {self.spread}"
            )
        falls = all(late > early for late, early in itertools.pairwise(self.path))
        if self.path and not (falls and self.path[0] == 1 and self.path[-1] == 0):
            raise ValueError(f"the times of the even grid must fall from 1 to 0, found {self.path}")

    def quantile(self, uniform: torch.Tensor) -> torch.Tensor:
        """The time below which the share `uniform` of windows' training times lies; in double precision, 0 -> 0 and 1 -> 1."""
        return self._quantile(uniform, self.std)

    def _quantile(self, uniform: torch.Tensor, std: float) -> torch.Tensor:
        u = uniform.double()
        t = u if self.kind == "uniform" else torch.sigmoid(self.mean + std * torch.special.ndtri(u))
        return self.shift * t / (1 + (self.shift - 1) * t)

    def grid(self, num_steps: int, kind: str = "training") -> torch.Tensor:
        """Float64 [num_steps + 1] from 1 (noise) down to 0 (data): windows' times, about which those of their tokens may be spread.

        "training" is dense where the tokens' times in training are, "uniform" has equal steps, "even" steps between which the model's
        estimate of z changes equally, as measured (`path`). Raises: ValueError for another kind, and for "even" without a measurement.
        """
        if kind not in GRIDS:
            raise ValueError(f"time grid {kind!r} is unknown; expected one of {', '.join(GRIDS)}")
        falling = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
        if kind == "uniform":
            return falling
        if kind == "training":
            return self._quantile(falling, math.hypot(self.std, self.spread))
        if len(self.path) < 2:
            raise ValueError(
                'time grid "even" needs the times measured on the trained model, and this one has none: run textldm diagnose on the run'
                " before it is exported, or choose the grid training or uniform"
            )
        table = torch.tensor(self.path, dtype=torch.float64)
        place = (1 - falling) * (len(table) - 1)
        below = place.long().clamp_max(len(table) - 2)
        return torch.lerp(table[below], table[below + 1], place - below)


class EstimatePath:
    """How far the one-step estimate of z has come by each time on the way from noise to data: where a solver needs its steps."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._moved: list[float] = []
        self._last_TZ: torch.Tensor | None = None

    def add(self, t: float, estimate_TZ: torch.Tensor) -> None:
        """The estimate at a time, which must be earlier than the one before (nearer to data)."""
        moved = 0.0 if self._last_TZ is None else (estimate_TZ - self._last_TZ).float().square().mean().sqrt().item()
        self._times.append(t)
        self._moved.append(moved)
        self._last_TZ = estimate_TZ

    def even_times(self, num_times: int = 33) -> tuple[float, ...]:
        """Falling from 1 to 0: between neighbours the estimate moves by the same root mean square (linear between what was added).

        Nothing if it did not move.
        """
        way = torch.tensor(self._moved, dtype=torch.float64).cumsum(0)
        if not len(way) or not way[-1] > 0:
            return ()
        wanted = torch.linspace(0, 1, num_times, dtype=torch.float64)[1:-1] * way[-1]
        after = torch.searchsorted(way, wanted).clamp(1, len(way) - 1)
        times = torch.tensor(self._times, dtype=torch.float64)
        share = (wanted - way[after - 1]) / (way[after] - way[after - 1])
        return (1.0, *torch.lerp(times[after - 1], times[after], share).tolist(), 0.0)


def move_logit(time: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The time whose logit is larger by `offset`, i.e. whose signal-to-noise ratio (1 - t) / t is exp(-offset) times as large."""
    return torch.sigmoid(torch.logit(time) + offset)
