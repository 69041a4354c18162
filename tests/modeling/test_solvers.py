"""Solvers reach the known endpoint at the order and with the evaluations that they declare; others join from outside."""

import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal

from modeling.solvers import SOLVERS, Solver, find_solver, integrate, solver_names
from modeling.textldm import TextLDM, TextLDMConfig
from modeling.times import TimeDistribution, move_logit
from pretrain.config.sections import Diagnose
from tests.modeling.mixture import Mixture

MEAN, STD = 0.7, 0.4


def gaussian_velocity(z_TZ: torch.Tensor, t: float) -> torch.Tensor:
    """E[v* | z_t] for data N(MEAN, STD^2). Its ODE leads from the noise eps to MEAN + STD eps exactly."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t - (1 - t) * STD**2) / variance * (z_TZ - (1 - t) * MEAN) - MEAN


def noise(num: int = 2000) -> torch.Tensor:
    """Float64 [num, 1]."""
    return torch.randn(num, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(eps_TZ: torch.Tensor, t: float) -> torch.Tensor:
    """The ODE's path from eps: the same quantile of every z_t."""
    return (1 - t) * MEAN + ((1 - t) ** 2 * STD**2 + t**2) ** 0.5 * eps_TZ


def error(solver: str, times: list[float]) -> float:
    """Root mean square distance from the exact end of the path."""
    found_TZ = integrate(gaussian_velocity, exact(noise(), times[0]), times, solver)
    return float((found_TZ - exact(noise(), times[-1])).square().mean().sqrt())


def inner_grid(num_steps: int) -> list[float]:
    """Quantiles of the paper's distribution between the shares 0.95 and 0.05."""
    shares = torch.linspace(0.95, 0.05, num_steps + 1, dtype=torch.float64)
    return TimeDistribution().quantile(shares).tolist()


GRIDS = {"uniform": TimeDistribution(kind="uniform").grid, "quantiles": inner_grid}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_token_with_times_of_its_own_goes_the_way_it_goes_alone_at_these_times(solver: str) -> None:
    """In fp32, too, though near noise and data such times lie closer together than fp32 tells apart."""
    grid, offsets = TimeDistribution(spread=1.5).grid(12).tolist(), (-9.0, 0.0, 2.5, 12.0)
    seen = []
    offsets_T1, eps_TZ = torch.tensor(offsets)[:, None], noise(4).float()
    together_TZ = integrate(
        gaussian_velocity, eps_TZ, grid, solver, lambda step, t, z_TZ: seen.append((t, z_TZ.dtype)), offsets_T1
    )
    assert seen == [(t, torch.float32) for t in grid[:-1]]
    assert together_TZ.dtype == torch.float32
    for offset, one_TZ, found_TZ in zip(offsets, eps_TZ.split(1), together_TZ.split(1)):
        own = move_logit(torch.tensor(grid, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64))
        alone_TZ = integrate(gaussian_velocity, one_TZ.double(), own.tolist(), solver)
        torch.testing.assert_close(found_TZ.double(), alone_TZ, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_halving_the_steps_shows_the_declared_order(solver: str, grid: str) -> None:
    # The corrector leaves so little of the second order here that higher ones hide it below a thousand steps.
    errors = torch.tensor([error(solver, list(map(float, GRIDS[grid](n)))) for n in (1000, 2000, 4000)])
    order = SOLVERS[solver].order
    orders = (errors[:-1] / errors[1:]).log2()
    assert orders.tolist() == pytest.approx([order, order], abs=0.3)
    assert errors[-1] < (1e-2 if order == 1 else 1e-4)


def test_on_the_whole_schedule_the_end_steps_limit_every_solver() -> None:
    """The logit-normal's outer quantiles close in on 0 and 1 more slowly than 1/n: no order is seen there, but no solver fails."""
    for solver in SOLVERS:
        errors = [error(solver, TimeDistribution().grid(n).tolist()) for n in (16, 50, 200)]
        assert errors[0] > errors[1] > errors[2]
        assert errors[1] < 0.02


def test_multistep_is_exact_where_the_estimate_is_linear_in_time() -> None:
    """Whatever the steps: z / t then grows by the integral of the estimate over -dt / t^2. Heun's method is not."""
    start, trend, times = 1.5, -0.8, [0.9, 0.6, 0.35, 0.1]

    def path(t: float) -> float:
        return t * (2.0 + start / t - trend * math.log(t))

    def velocity(z: torch.Tensor, t: float) -> torch.Tensor:
        return (z - (start + trend * t)) / t

    begin = torch.tensor([path(0.9)], dtype=torch.float64)
    found, coarse = (integrate(velocity, begin, times, solver) for solver in ("multistep", "heun"))
    assert found.item() == pytest.approx(path(0.1), rel=1e-12)
    assert coarse.item() != pytest.approx(path(0.1), rel=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_endpoint_has_the_distribution_of_the_data(solver: str) -> None:
    of = Mixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[-1.2], [0.6]], dtype=torch.float64),
        torch.tensor([[0.05], [0.2]], dtype=torch.float64),
    )

    def velocity(z_TZ: torch.Tensor, t: float) -> torch.Tensor:
        return (z_TZ - of.denoise(z_TZ, t)) / t

    eps_TZ = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    times = [*torch.linspace(1, 0.02, 400).tolist(), 0.0]  # no nearer to the data, where this divides by 0
    z_TZ = integrate(velocity, eps_TZ, times, solver)
    # In one dimension the flow keeps the order, so it maps quantiles to quantiles.
    spread_C = of.variances_CZ[:, 0].sqrt()
    found = (of.log_weights_C.exp() * Normal(of.means_CZ[:, 0], spread_C).cdf(z_TZ)).sum(-1)
    torch.testing.assert_close(found, Normal(0.0, 1.0).cdf(eps_TZ[:, 0]), rtol=0, atol=6e-3)


def test_a_straight_path_is_exact_in_one_step() -> None:
    data_TZ, noise_TZ = torch.randn(2, 5, 3, dtype=torch.float64)
    for solver in SOLVERS:
        found_TZ = integrate(lambda z, t: noise_TZ - data_TZ, noise_TZ, [1.0, 0.0], solver)
        torch.testing.assert_close(found_TZ, data_TZ)


@pytest.mark.parametrize("solver", SOLVERS)
def test_whole_numbers_are_times_too(solver: str) -> None:
    found_TZ, expected_TZ = (
        integrate(gaussian_velocity, noise(5), times, solver) for times in ([1, 0.5, 0], [1.0, 0.5, 0.0])
    )
    assert torch.equal(found_TZ, expected_TZ)


@pytest.mark.parametrize(("solver", "expected"), [("euler", 10), ("heun", 19), ("multistep", 10)])
def test_evaluations_are_those_declared(solver: str, expected: int) -> None:
    calls = []
    integrate(lambda z, t: calls.append(t) or z, noise(3), TimeDistribution().grid(10).tolist(), solver)
    assert len(calls) == expected
    assert 9 < len(calls) / SOLVERS[solver].evaluations <= 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_step_reports_its_estimate(solver: str) -> None:
    seen: list[tuple[int, float]] = []

    def report(step: int, t: float, estimate_TZ: torch.Tensor) -> None:
        seen.append((step, t))
        torch.testing.assert_close(estimate_TZ, torch.full_like(estimate_TZ, 2.0))

    path = noise(4)
    integrate(lambda z, t: path - 2.0, path, [1.0, 0.75, 0.5, 0.0], solver, on_step=report)
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5)]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="solver 'rk4' is unknown; expected one of euler, heun, multistep"):
        integrate(gaussian_velocity, noise(2), [1.0, 0.0], "rk4")
    for times in ([0.0, 1.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="must fall from noise to data"):
            integrate(gaussian_velocity, noise(2), times)


def midpoint(velocity, z_TZ, times):
    """A solver that this package does not have."""
    for t, s in itertools.pairwise(times):
        middle_TZ = z_TZ + (s - t) / 2 * velocity(z_TZ, t)
        z_TZ = z_TZ + (s - t) * velocity(middle_TZ, (t + s) / 2)
    return z_TZ


MIDPOINT = Solver("midpoint", 2, 2, midpoint)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers `MIDPOINT`."""
    metadata = tmp_path / "others-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[textldm.solvers]\nmidpoint = others_solvers:MIDPOINT\n")
    module = types.ModuleType("others_solvers")
    module.MIDPOINT = MIDPOINT
    monkeypatch.setitem(sys.modules, "others_solvers", module)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("installed")
def test_an_installed_package_adds_a_solver_by_name() -> None:
    assert solver_names() == ["euler", "heun", "multistep", "midpoint"]
    assert find_solver("midpoint") is MIDPOINT
    assert Diagnose(solver="midpoint").solver == "midpoint"
    model = TextLDM(TextLDMConfig(num_steps=5, guidance_scale=1.0)).eval()
    named, given, euler = (
        model.generate([[3, 5]], 4, solver=solver, on_step=lambda *_: None)
        for solver in ("midpoint", MIDPOINT, "euler")
    )
    assert [len(ids) for ids in named] == [4]
    assert torch.equal(named[0], given[0])
    assert len(euler[0]) == 4


@pytest.mark.usefixtures("installed")
def test_a_solver_from_outside_follows_the_flow() -> None:
    errors = [error("midpoint", inner_grid(n)) for n in (100, 200)]
    assert math.log2(errors[0] / errors[1]) > MIDPOINT.order - 0.1  # on a Gaussian it happens to be three
    seen: list[float] = []
    integrate(gaussian_velocity, noise(3), [1.0, 0.5, 0.25, 0.0], MIDPOINT, lambda step, t, z: seen.append(t))
    assert seen == [1.0, 0.5, 0.25]


def test_a_solver_that_declares_other_evaluations_than_it_takes_is_told() -> None:
    wrong = Solver("half", 2, 1, midpoint)
    with pytest.raises(ValueError, match=r"half began step 1 at t = 0\.75, which is not that step's time"):
        integrate(gaussian_velocity, noise(3), [1.0, 0.5, 0.0], wrong)
