"""What a categorical head knows before training: how often each token occurs, its mean latent, and how its latents vary around that.

Shape letters: M sampled tokens, Z latent dim, V vocabulary.
"""

import torch

MIN_VARIANCE = 1e-5
UNSEEN_COUNT = 0.5
"""Added to every token's count, so that none is impossible."""


def within_token_moments(
    latents_MZ: torch.Tensor, tokens_M: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Occurrences [V], mean latent of each token [V, Z] (zero without any), and the covariance within tokens [Z, Z], unbiased."""
    counts_V = torch.bincount(tokens_M, minlength=vocab_size).double()
    sums_VZ = latents_MZ.new_zeros(vocab_size, latents_MZ.shape[1]).index_add(0, tokens_M, latents_MZ)
    means_VZ = sums_VZ / counts_V.clamp_min(1)[:, None]
    within_MZ = latents_MZ - means_VZ[tokens_M]
    # A mean takes one degree of freedom of its token's occurrences.
    freedom = max(len(tokens_M) - int((counts_V > 0).sum()), 1)
    return counts_V, means_VZ, within_MZ.T @ within_MZ / freedom


def log_frequencies(counts_V: torch.Tensor) -> torch.Tensor:
    """fp32 [V], the logarithms of tokens' shares of a text, each token's count raised by `UNSEEN_COUNT`."""
    weights_V = counts_V.double() + UNSEEN_COUNT
    return (weights_V / weights_V.sum()).log().float()


def unigram_nats(counts_V: torch.Tensor, tokens_T: torch.Tensor) -> float:
    """Nats a token of tokens to who knows nothing but how often each occurred."""
    return -float(log_frequencies(counts_V)[tokens_T].double().mean())


def token_statistics(
    latents_MZ: torch.Tensor, tokens_M: torch.Tensor, placed_VZ: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The buffers `means` and `within_variance` of a `CategoricalHead`, fp32; double precision inside.

    A token's mean is estimated from its occurrences and from its encoding in place of others, by Bayes' rule per channel: means scatter
    around these encodings (moved by the mean difference) with a variance r, a token's latents around its mean with d; n occurrences
    weigh n / d, the encoding 1 / r. So a token that was never met has its encoding's mean, and a frequent one its own.

    Args:
        latents_MZ, tokens_M: standardised latents of training text, and of which tokens they are.
        placed_VZ: the standardised encoding of every token, put into text in place of others.
    """
    latents_MZ, placed_VZ = latents_MZ.double(), placed_VZ.double()
    sampled_V, means_VZ, covariance_ZZ = within_token_moments(latents_MZ, tokens_M, len(placed_VZ))
    within_Z = covariance_ZZ.diagonal().clamp_min(MIN_VARIANCE)
    seen_V = sampled_V > 0
    sampled_V1 = sampled_V[:, None]
    moved_VZ = placed_VZ + (sampled_V1 * (means_VZ - placed_VZ)).sum(0) / sampled_V.sum()
    # The squared distances of sampled means hold d / n of the sampling.
    scatter_Z = (((means_VZ - moved_VZ).square() - within_Z / sampled_V1.clamp_min(1))[seen_V]).mean(0)
    trust_Z = within_Z / scatter_Z.clamp_min(MIN_VARIANCE)
    means_VZ = (sampled_V1 * means_VZ + trust_Z * moved_VZ) / (sampled_V1 + trust_Z)
    return {"means": means_VZ.float(), "within_variance": within_Z.float()}
