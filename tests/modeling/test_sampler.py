"""Solvers reach the known endpoint at their order; guidance is the combination that it says."""

import math

import pytest
import torch
from torch.distributions import Normal

from modeling import flow
from modeling.attention import Segments
from modeling.floors import TokenMixture
from modeling.flow import TimeDistribution
from modeling.sampler import SOLVERS, GuidedVelocity, integrate
from modeling.text_dit import TextDiT, TextDiTConfig

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


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("multistep", 2.0)])
def test_halving_the_steps_shows_the_order(solver: str, order: float, grid: str) -> None:
    # The corrector leaves so little of the second order here that higher ones hide it below a thousand steps.
    errors = torch.tensor([error(solver, list(map(float, GRIDS[grid](n)))) for n in (1000, 2000, 4000)])
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
    of = TokenMixture(
        torch.tensor([0.3, 0.7], dtype=torch.float64).log(),
        torch.tensor([[-1.2], [0.6]], dtype=torch.float64),
        torch.tensor([[0.05], [0.2]], dtype=torch.float64),
    )

    def velocity(z_TZ: torch.Tensor, t: float) -> torch.Tensor:
        return flow.velocity_from_data(z_TZ, of.denoise(z_TZ, t), torch.tensor(t, dtype=torch.float64))

    eps_TZ = torch.linspace(-2.5, 2.5, 101, dtype=torch.float64)[:, None]
    # The last step is from flow.MIN_TIME, below which data prediction is clamped.
    times = [*torch.linspace(1, flow.MIN_TIME, 400).tolist(), 0.0]
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


@pytest.mark.parametrize(("solver", "expected"), [("euler", 10), ("heun", 19), ("multistep", 10)])
def test_evaluations_are_those_promised(solver: str, expected: int) -> None:
    calls = []
    integrate(lambda z, t: calls.append(t) or z, noise(3), TimeDistribution().grid(10).tolist(), solver)
    assert len(calls) == expected


def test_every_step_reports_its_estimate() -> None:
    seen: list[tuple[int, float]] = []

    def report(step: int, t: float, estimate_TZ: torch.Tensor) -> None:
        seen.append((step, t))
        torch.testing.assert_close(estimate_TZ, torch.full_like(estimate_TZ, 2.0))

    path = noise(4)
    integrate(lambda z, t: path - 2.0, path, [1.0, 0.75, 0.5, 0.0], on_step=report)
    assert seen == [(0, 1.0), (1, 0.75), (2, 0.5)]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="solver 'rk4' is unknown; expected one of euler, heun, multistep"):
        integrate(gaussian_velocity, noise(2), [1.0, 0.0], "rk4")
    for times in ([0.0, 1.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="must fall from noise to data"):
            integrate(gaussian_velocity, noise(2), times)


LENGTHS, CONTEXTS = [7, 5, 4], [3, 2, 0]


def make_dit(**options: object) -> TextDiT:
    """Random weights everywhere, so that every input matters."""
    torch.manual_seed(0)
    dit = TextDiT(TextDiTConfig(latent_dim=3, width=16, num_layers=2, head_dim=8, **options)).eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return dit.requires_grad_(False)


def packed() -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Context latents with rubbish at the targets, which must not be read; where targets are; windows."""
    is_target_T = torch.cat([torch.arange(n) >= c for n, c in zip(LENGTHS, CONTEXTS)])
    return torch.randn(sum(LENGTHS), 3), is_target_T, Segments.from_lengths(LENGTHS)


@pytest.mark.parametrize("time_conditioning", ["none", "adaln_zero"])
def test_guidance_combines_with_and_without_context(time_conditioning: str) -> None:
    dit, (context_TZ, is_target_T, windows), t = make_dit(time_conditioning=time_conditioning), packed(), 0.6
    z_TZ, time_T = torch.randn_like(context_TZ), torch.full((sum(LENGTHS),), t)
    target_T1 = is_target_T[:, None]
    with_TZ = dit(torch.where(target_T1, z_TZ, context_TZ), is_target_T, time_T, windows) * target_T1
    without_TZ = dit(z_TZ * target_T1, is_target_T, time_T, windows) * target_T1
    assert not torch.allclose(with_TZ, without_TZ)
    for scale, interval, expected_TZ in (
        (1.0, (0.0, 1.0), with_TZ),
        (0.0, (0.0, 1.0), without_TZ),
        (7.0, (0.0, 1.0), without_TZ + 7 * (with_TZ - without_TZ)),
        (7.0, (0.0, 0.5), with_TZ),
        (7.0, (0.7, 1.0), with_TZ),
    ):
        velocity = GuidedVelocity(dit, context_TZ, is_target_T, windows, scale, interval)
        torch.testing.assert_close(velocity(z_TZ, t), expected_TZ, rtol=1e-4, atol=1e-4)


def test_scale_one_does_half_the_work() -> None:
    dit, (context_TZ, is_target_T, windows) = make_dit(), packed()
    sizes: list[int] = []
    dit.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    for scale in (1.0, 3.0):
        GuidedVelocity(dit, context_TZ, is_target_T, windows, scale)(torch.randn_like(context_TZ), 0.5)
    assert sizes == [sum(LENGTHS), 2 * sum(LENGTHS)]


def test_self_conditioning_reads_the_last_estimate_of_the_guided_velocity() -> None:
    dit, (context_TZ, is_target_T, windows) = make_dit(self_conditioning=True), packed()
    velocity = GuidedVelocity(dit, context_TZ, is_target_T, windows, 3.0)
    z_TZ = torch.randn_like(context_TZ)
    first_TZ = velocity(z_TZ, 0.8)
    estimate_TZ = (z_TZ - 0.8 * first_TZ) * is_target_T[:, None]
    inputs_TZ = torch.where(is_target_T[:, None], z_TZ, context_TZ)
    time_T = torch.full((sum(LENGTHS),), 0.5)
    with_TZ = dit(inputs_TZ, is_target_T, time_T, windows, estimate_TZ)
    without_TZ = dit(z_TZ * is_target_T[:, None], is_target_T, time_T, windows, estimate_TZ)
    expected_TZ = flow.guide(with_TZ, without_TZ, 3.0) * is_target_T[:, None]
    torch.testing.assert_close(velocity(z_TZ, 0.5), expected_TZ, rtol=1e-4, atol=1e-4)
    fresh_TZ = GuidedVelocity(dit, context_TZ, is_target_T, windows, 3.0)(z_TZ, 0.5)
    assert not torch.allclose(fresh_TZ, expected_TZ, atol=1e-3)


def test_a_belief_scale_multiplies_what_the_context_adds_to_the_token_logits() -> None:
    dit, (context_TZ, is_target_T, windows) = make_dit(prediction="posterior", vocab_size=5), packed()
    z_TZ = torch.randn_like(context_TZ)
    assert dit.posterior is not None
    dit.posterior.means.copy_(torch.randn(5, 3))
    scaled_TZ = GuidedVelocity(dit, context_TZ, is_target_T, windows, belief_scale=2.5)(z_TZ, 0.6)
    plain_TZ = GuidedVelocity(dit, context_TZ, is_target_T, windows)(z_TZ, 0.6)
    dit.posterior.to_logits.weight.mul_(2.5)
    torch.testing.assert_close(scaled_TZ, GuidedVelocity(dit, context_TZ, is_target_T, windows)(z_TZ, 0.6))
    assert not torch.allclose(scaled_TZ, plain_TZ)
    with pytest.raises(ValueError, match="belief_scale is 2, but this DiT predicts velocity"):
        GuidedVelocity(make_dit(), context_TZ, is_target_T, windows, belief_scale=2.0)
