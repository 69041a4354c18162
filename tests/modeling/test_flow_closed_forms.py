"""Velocity, score and transport of Gaussians and mixtures in several dimensions, known in closed form, against flow, floors and solvers."""

import functools
import math

import pytest
import torch

from modeling import flow
from modeling.solvers import integrate
from modeling.times import TimeDistribution
from tests.modeling.mixture import Mixture

double = {"dtype": torch.float64}


def mixture(dims: int = 3) -> Mixture:
    """Four Gaussians, diagonal."""
    generator = torch.Generator().manual_seed(0)
    weights_C = torch.tensor([0.1, 0.2, 0.3, 0.4], **double)
    means_CZ = 1.5 * torch.randn(4, dims, generator=generator, **double)
    return Mixture(weights_C.log(), means_CZ, 0.05 + 0.3 * torch.rand(4, dims, generator=generator, **double))


def log_density(of: Mixture, noisy_MZ: torch.Tensor, time: float) -> torch.Tensor:
    """log p_t(z_t): z_t of a Gaussian token is Gaussian, with mean (1-t) m and variance (1-t)^2 c + t^2."""
    variances_CZ = (1 - time) ** 2 * of.variances_CZ + time**2
    gaps_MCZ = noisy_MZ[:, None] - (1 - time) * of.means_CZ
    logs_MC = -0.5 * (gaps_MCZ**2 / variances_CZ + (2 * math.pi * variances_CZ).log()).sum(-1)
    return (of.log_weights_C + logs_MC).logsumexp(-1)


def velocity(of: Mixture, noisy_MZ: torch.Tensor, time: float) -> torch.Tensor:
    """E[v* | z_t] through its denoiser."""
    return (noisy_MZ - of.denoise(noisy_MZ, time)) / time


@pytest.mark.parametrize("time", [0.1, 0.5, 0.9])
def test_denoiser_score_and_velocity_are_one_thing(time: float) -> None:
    """Tweedie: E[eps | z_t] = -t score(z_t), with the score by autograd of the density; z and v follow from eps."""
    noisy_MZ = torch.randn(50, 3, **double).requires_grad_()
    (score_MZ,) = torch.autograd.grad(log_density(mixture(), noisy_MZ, time).sum(), noisy_MZ)
    noise_MZ = -time * score_MZ
    data_MZ = (noisy_MZ - time * noise_MZ) / (1 - time)
    torch.testing.assert_close(mixture().denoise(noisy_MZ, time), data_MZ, rtol=1e-8, atol=1e-8)
    expected_MZ = flow.velocity(data_MZ, noise_MZ)
    torch.testing.assert_close(velocity(mixture(), noisy_MZ, time), expected_MZ, rtol=1e-7, atol=1e-7)


def test_the_velocity_carries_the_density() -> None:
    """The continuity equation, d log p / dt = -div v - v . score, by autograd and central differences."""
    of, time, step = mixture(2), 0.4, 1e-5
    noisy_MZ = torch.randn(30, 2, **double).requires_grad_()
    rate_M = (log_density(of, noisy_MZ, time + step) - log_density(of, noisy_MZ, time - step)) / (2 * step)
    (score_MZ,) = torch.autograd.grad(log_density(of, noisy_MZ, time).sum(), noisy_MZ)
    flow_MZ = velocity(of, noisy_MZ, time)
    divergence_M = sum(torch.autograd.grad(flow_MZ[:, i].sum(), noisy_MZ, retain_graph=True)[0][:, i] for i in range(2))
    torch.testing.assert_close(rate_M, -divergence_M - (flow_MZ * score_MZ).sum(-1), rtol=1e-5, atol=1e-6)


@functools.cache
def end(solver: str, num_steps: int, kind: str) -> torch.Tensor:
    """Forty paths of the mixture's flow at t = 0.05, from 0.95."""
    noise_MZ = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), **double)
    shares = torch.linspace(0.95, 0.05, num_steps + 1, **double)
    times = shares if kind == "uniform" else TimeDistribution(std=0.8).quantile(shares)
    return integrate(lambda z, t: velocity(mixture(), z, t), noise_MZ, times.tolist(), solver)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1.0), ("heun", 2.0), ("multistep", 2.0)])
@pytest.mark.parametrize("kind", ["training", "uniform"])
def test_orders_on_a_mixture(solver: str, order: float, kind: str) -> None:
    """Between t = 0.95 and 0.05, against a solution with 4,000 steps of Heun."""
    fine_MZ = end("heun", 4000, kind)
    errors = [float((end(solver, n, kind) - fine_MZ).square().mean().sqrt()) for n in (400, 800)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("solver", ["heun", "multistep"])
def test_a_correlated_gaussian_is_transported_by_its_square_root(solver: str) -> None:
    """With covariance C the ODE's map from noise is C^(1/2): z_t = ((1-t)^2 C + t^2)^(1/2) eps."""
    root_ZZ = torch.tensor([[1.0, 0.3], [0.3, 0.5]], **double)
    covariance_ZZ, identity_ZZ = root_ZZ @ root_ZZ, torch.eye(2, **double)

    def gaussian_velocity(z_MZ: torch.Tensor, t: float) -> torch.Tensor:
        slope_ZZ = t * identity_ZZ - (1 - t) * covariance_ZZ
        return z_MZ @ torch.linalg.inv((1 - t) ** 2 * covariance_ZZ + t**2 * identity_ZZ) @ slope_ZZ

    noise_MZ = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), **double)
    found_MZ = integrate(gaussian_velocity, noise_MZ, TimeDistribution(kind="uniform").grid(1000).tolist(), solver)
    torch.testing.assert_close(found_MZ, noise_MZ @ root_ZZ, rtol=0, atol=1e-4)


def test_the_endpoint_of_a_mixture_has_its_moments() -> None:
    of = mixture()
    noise_MZ = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(2), **double)
    times = [*torch.linspace(1, 0.005, 100, **double).tolist(), 0.0]
    found_MZ = integrate(lambda z, t: velocity(of, z, t), noise_MZ, times, "multistep")
    weights_C1 = of.log_weights_C.exp()[:, None]
    mean_Z = (weights_C1 * of.means_CZ).sum(0)
    centred_CZ = of.means_CZ - mean_Z
    covariance_ZZ = torch.diag((weights_C1 * of.variances_CZ).sum(0)) + centred_CZ.T @ (weights_C1 * centred_CZ)
    torch.testing.assert_close(found_MZ.mean(0), mean_Z, rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(found_MZ.T), covariance_ZZ, rtol=0, atol=0.08)
