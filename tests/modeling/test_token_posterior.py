"""The token posterior: Bayes' rule in closed form, checked against brute force, and what the network's numbers do to it."""

import pytest
import torch

from modeling import flow
from modeling.layers import initialize
from modeling.token_posterior import TokenPosterior, offset_variance, token_statistics, within_token_moments

WIDTH, LATENT, VOCAB = 8, 2, 5


def language(num: int = 60_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Latents of random tokens with one covariance within all of them; and the truth: frequencies, means, covariance."""
    generator = torch.Generator().manual_seed(seed)
    frequencies_V = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64)
    means_VZ = torch.randn(VOCAB, LATENT, generator=generator, dtype=torch.float64)
    root_ZZ = torch.tensor([[0.30, 0.10], [0.0, 0.15]], dtype=torch.float64)
    tokens_M = torch.multinomial(frequencies_V, num, replacement=True, generator=generator)
    noise_MZ = torch.randn(num, LATENT, generator=generator, dtype=torch.float64)
    truth = {"frequencies": frequencies_V, "means": means_VZ, "covariance": root_ZZ.T @ root_ZZ}
    return means_VZ[tokens_M] + noise_MZ @ root_ZZ, tokens_M, truth


def make_posterior(latents_MZ: torch.Tensor, tokens_M: torch.Tensor) -> TokenPosterior:
    """With fitted statistics and initial weights: a network that says nothing."""
    posterior = TokenPosterior(WIDTH, LATENT, VOCAB)
    initialize(posterior)
    for name, tensor in token_statistics(latents_MZ, tokens_M, torch.arange(len(tokens_M)) // 100, VOCAB).items():
        posterior.get_buffer(name).copy_(tensor)
    return posterior.requires_grad_(False)


def lone(posterior: TokenPosterior, hidden_MD: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head for tokens without any offset."""
    no_MZ = torch.zeros(len(hidden_MD), LATENT)
    return posterior(hidden_MD, *rest, 1.0, no_MZ, no_MZ + 1, torch.zeros(len(hidden_MD), dtype=torch.bool))


def test_statistics_find_frequencies_means_and_covariance() -> None:
    latents_MZ, tokens_M, truth = language()
    found = token_statistics(latents_MZ, tokens_M, torch.arange(len(tokens_M)) // 100, VOCAB + 1)
    basis_ZZ = found["basis"].double()
    torch.testing.assert_close(basis_ZZ @ basis_ZZ.T, torch.eye(LATENT, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["means"][:VOCAB].double() @ basis_ZZ.T, truth["means"], rtol=0, atol=0.02)
    covariance_ZZ = basis_ZZ @ found["pooled_variances"].double().diag() @ basis_ZZ.T
    torch.testing.assert_close(covariance_ZZ, truth["covariance"], rtol=0.03, atol=0.001)
    torch.testing.assert_close(found["log_frequencies"].exp()[:VOCAB].double(), truth["frequencies"], rtol=0, atol=0.01)
    # A token that was never seen: half an occurrence, the mean of all latents' origin, everybody's variance.
    assert found["log_frequencies"][VOCAB].exp() == pytest.approx(0.5 / (60_000 + 0.5 * (VOCAB + 1)), rel=1e-4)
    assert found["means"][VOCAB].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found["variances"][VOCAB], found["pooled_variances"])


def test_moments_are_unbiased_for_few_occurrences() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_M = torch.arange(20_000).repeat_interleave(2)  # every token twice
    latents_MZ = torch.randn(40_000, 3, generator=generator, dtype=torch.float64)
    _, _, covariance_ZZ = within_token_moments(latents_MZ, tokens_M, 20_000)
    torch.testing.assert_close(covariance_ZZ, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.03)


@pytest.mark.parametrize("time", [0.05, 0.3, 0.6, 0.9])
def test_without_a_network_it_is_the_bayes_denoiser_of_one_token(time: float) -> None:
    """Against sums over tokens in float64 with full covariances, which share nothing with the module's arithmetic."""
    latents_MZ, tokens_M, _ = language()
    posterior = make_posterior(latents_MZ, tokens_M)
    statistics = {name: buffer.double() for name, buffer in posterior.named_buffers()}
    basis_ZZ, eye_ZZ = statistics["basis"], torch.eye(LATENT, dtype=torch.float64)
    means_VZ = statistics["means"] @ basis_ZZ.T
    clean_MZ = latents_MZ[:300]
    noisy_MZ = flow.interpolate(clean_MZ, torch.randn_like(clean_MZ), torch.tensor(time))
    pooled_ZZ = basis_ZZ @ statistics["pooled_variances"].diag() @ basis_ZZ.T
    spread = torch.distributions.MultivariateNormal(
        (1 - time) * means_VZ, (1 - time) ** 2 * pooled_ZZ + time**2 * eye_ZZ
    )
    joint_MV = statistics["log_frequencies"] + spread.log_prob(noisy_MZ[:, None])
    share_MV = joint_MV.softmax(-1)

    time_M1 = torch.full((300, 1), time)
    logits_MV = posterior.unigram_logits(noisy_MZ.float(), time_M1)
    torch.testing.assert_close(logits_MV.softmax(-1).double(), share_MV, rtol=1e-3, atol=1e-4)

    means_MZ, variances_MZ = share_MV @ means_VZ, share_MV @ statistics["variances"]
    expected_MZ = torch.stack(
        [
            mean
            + (1 - time) * cov @ torch.linalg.solve((1 - time) ** 2 * cov + time**2 * eye_ZZ, z - (1 - time) * mean)
            for mean, z, cov in zip(means_MZ, noisy_MZ, (basis_ZZ @ v.diag() @ basis_ZZ.T for v in variances_MZ))
        ]
    )
    found = posterior.estimate(logits_MV, noisy_MZ.float(), time_M1)
    torch.testing.assert_close(found.latents_TZ.double(), expected_MZ, rtol=1e-3, atol=1e-3)
    deviation_MZ = (expected_MZ - means_MZ) @ basis_ZZ / variances_MZ.sqrt()
    torch.testing.assert_close(found.deviation_TZ.double(), deviation_MZ, rtol=1e-3, atol=2e-3)
    velocity_MZ, _ = lone(posterior, torch.zeros(300, WIDTH), logits_MV, noisy_MZ.float(), time_M1)
    torch.testing.assert_close(
        flow.data_from_velocity(noisy_MZ, velocity_MZ.double(), torch.tensor(time)), expected_MZ, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("time", [0.0, 0.3, 0.8])
def test_the_offset_of_a_group_is_the_mean_of_a_gaussian(time: float) -> None:
    """Against the joint Gaussian of a group's offset and its noisy latents, in float64."""
    latents_MZ, tokens_M, _ = language()
    posterior = make_posterior(latents_MZ, tokens_M)
    posterior.shared_variance.copy_(torch.tensor([3.0, 0.5]))
    posterior.own_variance.copy_(torch.tensor([0.4, 0.9]))
    token, size = 1, 6
    d_Z, m_Z = posterior.variances[token].double(), posterior.means[token].double()
    generator = torch.Generator().manual_seed(2)
    noisy_MZ = (1 - time) * m_Z + torch.randn(size, LATENT, generator=generator, dtype=torch.float64)
    logits_MV = torch.full((size, VOCAB), -1e9).index_fill(1, torch.tensor([token]), 0.0)
    alone = posterior.estimate(logits_MV, (noisy_MZ @ posterior.basis.double().T).float(), torch.full((size, 1), time))
    found = posterior.offset(alone, torch.tensor([0, 2, 2, 2, 2, 2]), 4)
    assert not found.mean_GZ[[1, 3]].any()
    for group, rows in ((0, [0]), (2, [1, 2, 3, 4, 5])):
        for channel in range(LATENT):
            d, n, signal = float(d_Z[channel]), len(rows), 1 - time
            prior, own = float(posterior.shared_variance[channel]) / n, float(posterior.own_variance[channel])
            ones_N, eye_NN = torch.ones(n).double(), torch.eye(n).double()
            covariance_NN = signal**2 * d * (prior * torch.outer(ones_N, ones_N) + own * eye_NN) + time**2 * eye_NN
            rest_N = noisy_MZ[rows, channel] - signal * m_Z[channel]
            offset = signal * d * prior * ones_N @ torch.linalg.solve(covariance_NN, rest_N) / d**0.5
            told = signal**2 * d * prior * ones_N @ torch.linalg.solve(covariance_NN, ones_N)
            assert float(found.mean_GZ[group, channel]) == pytest.approx(float(offset), rel=1e-3, abs=1e-4)
            assert float(found.open_GZ[group, channel]) == pytest.approx(1 - float(told), rel=1e-3, abs=1e-4)
            assert float(found.prior_GZ[group, channel]) == pytest.approx(prior)
    context, target = found.alternate()
    assert torch.equal(torch.stack((context.mean_GZ, target.mean_GZ), 1).flatten(0, 1), found.mean_GZ)


def test_the_offsets_variance_is_found_in_segments_of_many_lengths() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths_S = torch.randint(1, 200, (4000,), generator=generator)
    segments_M = torch.arange(len(lengths_S)).repeat_interleave(lengths_S)
    offsets_SZ = torch.randn(len(lengths_S), 3, generator=generator, dtype=torch.float64) / lengths_S[:, None].sqrt()
    own_MZ = torch.randn(len(segments_M), 3, generator=generator, dtype=torch.float64)
    shared, own = torch.tensor([0.0, 2.0, 30.0]), torch.tensor([1.0, 0.7, 0.4])
    found, rest = offset_variance(shared.sqrt() * offsets_SZ[segments_M] + own.sqrt() * own_MZ, segments_M)
    torch.testing.assert_close(found.float(), shared, rtol=0.06, atol=0.03)
    torch.testing.assert_close(rest.float(), own, rtol=0.02, atol=0.02)


def test_a_network_that_knows_the_token_and_its_deviation_leaves_only_noise() -> None:
    latents_MZ, tokens_M, _ = language()
    posterior = make_posterior(latents_MZ, tokens_M)
    clean_MZ, time_M1 = latents_MZ[:2000].float(), torch.full((2000, 1), 0.8)
    noise_MZ = torch.randn_like(clean_MZ)
    noisy_MZ = flow.interpolate(clean_MZ, noise_MZ, time_M1)
    unigram_MV = posterior.unigram_logits(noisy_MZ, time_M1)

    # The head's linear maps read the answers off a hidden state made of them.
    basis_ZZ, means_VZ, variances_VZ = posterior.basis, posterior.means, posterior.variances
    tokens_M = tokens_M[:2000]
    deviation_MZ = (clean_MZ @ basis_ZZ - means_VZ[tokens_M]) / variances_VZ[tokens_M].sqrt()
    hidden_MD = torch.cat((100.0 * torch.nn.functional.one_hot(tokens_M, VOCAB), deviation_MZ), dim=1)
    wide = TokenPosterior(VOCAB + LATENT, LATENT, VOCAB)
    wide.load_state_dict(dict(posterior.named_buffers()), strict=False)
    with torch.no_grad():
        wide.to_logits.weight.copy_(torch.eye(VOCAB, VOCAB + LATENT))
        wide.to_shift.weight.copy_(torch.eye(LATENT, VOCAB + LATENT).roll(VOCAB, 1))
        wide.to_shift.bias.zero_()
        velocity_MZ, logits_MV = lone(wide, hidden_MD, unigram_MV, noisy_MZ, time_M1)
    assert torch.equal(logits_MV.argmax(-1), tokens_M)
    found = (velocity_MZ - flow.velocity(clean_MZ, noise_MZ)).square().mean()
    ignorant, _ = lone(posterior, torch.zeros(2000, WIDTH), unigram_MV, noisy_MZ, time_M1)
    before = (ignorant - flow.velocity(clean_MZ, noise_MZ)).square().mean()
    # What remains: the shifted mean is still mixed with z_t by the gain of a token's whole variance.
    assert found < 0.1 * before
