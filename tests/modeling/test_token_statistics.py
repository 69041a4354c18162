"""What is known of tokens: frequent ones by their occurrences, rare and unseen ones by their encoding in place of others."""

import pytest
import torch

from modeling.token_statistics import log_frequencies, token_statistics, within_token_moments

double = {"dtype": torch.float64}


def test_moments_are_unbiased_for_few_occurrences() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens_M = torch.arange(20_000).repeat_interleave(2)  # every token twice
    latents_MZ = torch.randn(40_000, 3, generator=generator, **double)
    counts_V, _, covariance_ZZ = within_token_moments(latents_MZ, tokens_M, 20_001)
    torch.testing.assert_close(covariance_ZZ, torch.eye(3, **double), rtol=0, atol=0.03)
    assert (counts_V[0], counts_V[-1]) == (2, 0)


def language(vocab_size: int = 3000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents and tokens of which many are rare; every token's encoding elsewhere, scattered around its mean; the true means."""
    generator = torch.Generator().manual_seed(0)
    means_VZ = torch.randn(vocab_size, 4, generator=generator, **double)
    placed_VZ = means_VZ + 0.5 + 0.2 * torch.randn(vocab_size, 4, generator=generator, **double)
    frequencies_V = 1 / (1 + torch.arange(vocab_size, **double))
    tokens_M = torch.multinomial(frequencies_V, 20_000, replacement=True, generator=generator)
    return (
        means_VZ[tokens_M] + 0.3 * torch.randn(20_000, 4, generator=generator, **double),
        tokens_M,
        placed_VZ,
        means_VZ,
    )


def test_unseen_and_rare_tokens_get_their_mean_from_their_encoding() -> None:
    latents_MZ, tokens_M, placed_VZ, means_VZ = language()
    found = token_statistics(latents_MZ, tokens_M, placed_VZ)
    counts_V = torch.bincount(tokens_M, minlength=len(means_VZ))
    error_V = (found["means"] - means_VZ).square().mean(-1).sqrt()
    assert (counts_V == 0).sum() > 100
    sampled_VZ = torch.zeros_like(means_VZ).index_add(0, tokens_M, latents_MZ) / counts_V.clamp_min(1)[:, None]
    for few, most in ((0, 0.25), (1, 0.19), (3, 0.15)):
        # Of the truth's scatter around the encodings, 0.2, and the sample's, 0.3 / sqrt(n), less than either.
        of_few_V = counts_V == few
        assert error_V[of_few_V].mean() < most
        if few:
            assert error_V[of_few_V].mean() < (sampled_VZ - means_VZ)[of_few_V].square().mean(-1).sqrt().mean()
    assert error_V[counts_V > 300].mean() < 0.03
    assert found["within_variance"].tolist() == pytest.approx([0.09] * 4, rel=0.05)


def test_frequencies_are_those_of_the_counts_and_never_zero() -> None:
    found_V = log_frequencies(torch.arange(3000))
    expected_V = (torch.arange(3000, **double) + 0.5) / (2999 * 1500 + 1500)
    torch.testing.assert_close(found_V.double().exp(), expected_V, rtol=1e-5, atol=0)
