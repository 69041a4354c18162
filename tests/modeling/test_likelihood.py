"""The bound against closed forms in float64: entropies that are known, and invariances that must hold."""

import functools
import math

import pytest
import torch

from modeling import flow
from modeling.likelihood import (
    Denoised,
    DocumentNats,
    bound_at,
    document_nats,
    least_bound,
    per_token,
    quadrature,
    spread_nats,
    time_grid,
)
from modeling.token_statistics import unigram_nats

double = {"dtype": torch.float64}
TOKENS, LATENT = 8, 4
GRID = time_grid()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **double)


def language(num: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies [V] and independent tokens [T]."""
    frequencies_V = (1.2 * draw(TOKENS, seed=7)).softmax(0)
    generator = torch.Generator().manual_seed(seed)
    return frequencies_V, torch.multinomial(frequencies_V, num, replacement=True, generator=generator)


def optimal(means_VZ: torch.Tensor, frequencies_V: torch.Tensor, tokens_T: torch.Tensor):  # type: ignore[no-untyped-def]
    """Bayes' denoiser of point masses at the means, and its belief in the true token."""

    def denoise(noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> Denoised:
        t = time_T[:, None]
        gaps_TV = (noisy_TZ[:, None] - (1 - t[..., None]) * means_VZ).square().sum(-1)
        logits_TV = frequencies_V.log() - gaps_TV / (2 * t * t)
        velocity_TZ = (noisy_TZ - logits_TV.softmax(-1) @ means_VZ) / t
        return Denoised(velocity_TZ, torch.nn.functional.cross_entropy(logits_TV, tokens_T, reduction="none"))

    return denoise


def measure(
    means_VZ: torch.Tensor, num: int = 20_000, length: int = 100, times: tuple[float, ...] = GRID, seed: int = 0
) -> tuple[DocumentNats, float]:
    """Documents of `length` tokens under the optimal model, and the entropy of a token."""
    frequencies_V, tokens_T = language(num, seed)
    found = document_nats(
        optimal(means_VZ, frequencies_V, tokens_T),
        means_VZ[tokens_T],
        lambda i: draw(num, means_VZ.shape[1], seed=1000 * seed + i),
        torch.arange(num) // length,
        torch.ones(num, dtype=torch.bool),
        times,
    )
    return found, -float((frequencies_V * frequencies_V.log()).sum())


means = functools.partial(draw, TOKENS, LATENT)


def test_the_bound_of_the_optimal_denoiser_is_the_entropy_at_every_t0() -> None:
    found, entropy = measure(means(), num=60_000)
    assert found.curve == pytest.approx([entropy] * len(GRID), rel=0.01)
    bound = least_bound(found)
    assert bound.nats == pytest.approx(entropy, rel=0.01)
    assert bound.nats == pytest.approx(bound.cross_entropy + bound.flow)
    fixed = bound_at(found, 10)
    assert fixed.flow == pytest.approx(float(found.flow_parts_NG[:, 10].sum()) / 60_000)
    assert (bound.tokens, bound.documents) == (60_000, 600)


def pairs(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A language of documents of two tokens that depend on each other: the logarithms of their frequencies [V, V], and tokens [T]."""
    logits_VV = (1.5 * draw(TOKENS, TOKENS, seed=8)).flatten().log_softmax(0)
    drawn = torch.multinomial(logits_VV.exp(), num, replacement=True, generator=torch.Generator().manual_seed(0))
    return logits_VV.view(TOKENS, TOKENS), torch.stack((drawn // TOKENS, drawn % TOKENS), 1).flatten()


@pytest.mark.parametrize("t0", [0.2, 0.5, 0.8])
def test_whatever_times_its_tokens_take_the_optimal_denoisers_bound_is_the_entropy(t0: float) -> None:
    """Also of tokens that tell of each other, some of them clean while their neighbours are noise; and one time for all is one way."""
    num = 10_000
    (log_VV, tokens_T), means_VZ = pairs(num // 2), 1.5 * means()
    data_TZ, documents_T, everything_T = means_VZ[tokens_T], torch.arange(num) // 2, torch.ones(num, dtype=torch.bool)

    def denoise(noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> Denoised:
        t = time_T[:, None]
        seen_TV = -(noisy_TZ[:, None] - (1 - t[..., None]) * means_VZ).square().sum(-1) / (2 * t * t)
        joint_NVV = log_VV + seen_TV[0::2, :, None] + seen_TV[1::2, None, :]
        logits_TV = torch.stack((joint_NVV.logsumexp(2), joint_NVV.logsumexp(1)), 1).flatten(0, 1)
        velocity_TZ = (noisy_TZ - logits_TV.softmax(-1) @ means_VZ) / t
        return Denoised(velocity_TZ, torch.nn.functional.cross_entropy(logits_TV, tokens_T, reduction="none"))

    given = (denoise, data_TZ, lambda i: draw(num, LATENT, seed=i), documents_T, everything_T)
    sampled = -float(log_VV[tokens_T[0::2], tokens_T[1::2]].mean()) / 2
    # What each token says by itself is left in the cross-entropy at t0, which knows of the pair only what both noisy tokens tell.
    measured = document_nats(*given, time_grid(24, t0))
    alone = measured.curve[0]
    for deviation in (0.0, 2.0):
        found = spread_nats(*given, t0, deviation, draw(num, 2, seed=9), num_levels=64)
        assert found.curve == pytest.approx([alone], rel=0.02)
        for few in (3, 12):  # no bias, however few levels there are
            rough = spread_nats(*given, t0, deviation, draw(num, 2, seed=10 + few), num_levels=few)
            more, error = per_token((rough.bounds_NG - measured.bounds_NG)[:, 0], rough.tokens_N)
            assert error < 0.05 * alone
            assert abs(more) < 3 * error
        assert alone > sampled * 0.98
        if t0 == 0.2:
            assert found.curve == pytest.approx([sampled], rel=0.02)


@pytest.mark.parametrize("spread", [0.0, 1.5])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_however_few_levels_there_are_their_mean_over_documents_is_the_integral(spread: float, num_levels: int) -> None:
    """Of a model whose squared error is 1 at every time, whose integral is that of (1 - t) / t: no noise, so a bias shows by itself."""
    num, t0 = 100_000, 0.4
    zeros_TZ = torch.zeros(num, 1, **double)
    found = spread_nats(
        lambda noisy_TZ, time_T: Denoised(torch.ones_like(noisy_TZ), torch.zeros_like(time_T)),
        zeros_TZ,
        lambda i: zeros_TZ,
        torch.arange(num),
        torch.ones(num, dtype=torch.bool),
        t0,
        spread,
        draw(num, 2, seed=3),
        num_levels,
    )
    nats, error = per_token(found.bounds_NG[:, 0], found.tokens_N)
    expected = -math.log(t0) - (1 - t0)
    assert error < 0.01 * expected
    assert abs(nats - expected) < 4 * error


def test_any_other_model_lies_above_the_entropy() -> None:
    """Its means shrunk, or its frequencies flattened: both parts together never cost less, and mostly more."""
    (frequencies_V, tokens_T), means_VZ = language(20_000), means()
    everything_T = torch.ones(20_000, dtype=torch.bool)
    given = (
        means_VZ[tokens_T],
        lambda i: draw(20_000, LATENT, seed=i),
        torch.arange(20_000) // 100,
        everything_T,
        GRID,
    )
    right = document_nats(optimal(means_VZ, frequencies_V, tokens_T), *given)
    flat_V = torch.full((TOKENS,), 1 / TOKENS, **double)
    for wrong in (optimal(0.8 * means_VZ, frequencies_V, tokens_T), optimal(means_VZ, flat_V, tokens_T)):
        more_G = torch.tensor(document_nats(wrong, *given).curve) - torch.tensor(right.curve)
        assert more_G.min() > -5e-3
        assert more_G[:8].min() > 0.1
    # Who believes in equal frequencies and is right about the means pays the cross-entropy to them, log V.
    assert document_nats(optimal(means_VZ, flat_V, tokens_T), *given).curve == pytest.approx(
        [math.log(TOKENS)] * len(GRID), rel=0.01
    )


def test_rotated_and_rescaled_latents_have_the_same_bound() -> None:
    plain, _ = measure(means())
    rotation_ZZ = torch.linalg.qr(draw(LATENT, LATENT, seed=5)).Q
    rotated, _ = measure(means() @ rotation_ZZ)
    assert least_bound(rotated).nats == pytest.approx(least_bound(plain).nats, rel=0.005)
    for scale in (0.5, 2.0):
        # z -> s z at the time with the same signal-to-noise ratio: (1 - t') s / t' = (1 - t) / t.
        times = (*(scale * t / (1 - t + scale * t) for t in GRID[:-1]), 1.0)
        scaled, _ = measure(scale * means(), times=times)
        assert scaled.curve == pytest.approx(plain.curve, rel=0.005)
        assert least_bound(scaled).nats == pytest.approx(least_bound(plain).nats, rel=0.005)


def test_the_flow_part_of_gaussian_data_is_its_information() -> None:
    """E KL(q(z_t0 | z) || p(z_t0)) = 1/2 sum log(1 + SNR l) over the covariance's eigenvalues l."""
    eigenvalues_Z, num = torch.tensor([0.05, 0.4, 1.0, 2.55], **double), 40_000
    data_TZ = draw(num, LATENT, seed=3) * eigenvalues_Z.sqrt()

    def denoise(noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> Denoised:
        t = time_T[:, None]
        slope_Z = (t - (1 - t) * eigenvalues_Z) / ((1 - t) ** 2 * eigenvalues_Z + t**2)
        return Denoised(slope_Z * noisy_TZ, torch.zeros(num, **double))

    everything_T = torch.ones(num, dtype=torch.bool)
    found = document_nats(
        denoise, data_TZ, lambda i: draw(num, LATENT, seed=50 + i), torch.arange(num) // 100, everything_T, GRID
    )
    expected = [0.5 * float((1 + ((1 - t) / t) ** 2 * eigenvalues_Z).log().sum()) for t in GRID]
    assert found.curve == pytest.approx(expected, rel=0.01, abs=1e-4)


def test_the_error_is_that_of_repetitions_and_the_mean_does_not_depend_on_the_rows() -> None:
    few = [least_bound(measure(means(), num=600, length=30, seed=seed)[0]) for seed in range(40)]
    many, entropy = measure(means(), num=24_000, length=30, seed=99)
    values = torch.tensor([bound.nats for bound in few], **double)
    spread = float(values.std())
    assert float(values.mean()) == pytest.approx(entropy, abs=3.5 * spread / math.sqrt(len(few)))
    assert spread == pytest.approx(sum(bound.error for bound in few) / len(few), rel=0.35)
    assert least_bound(many).nats == pytest.approx(float(values.mean()), abs=4 * spread / math.sqrt(len(few)))


def test_no_document_chooses_its_own_t0() -> None:
    """Two times, noise around equal bounds: a choice on the reported documents would look better than either."""
    noise_NG = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), **double)
    times, ones_N = (0.2, 0.6, 1.0), torch.ones(400, dtype=torch.int64)
    drawn = []
    for part_NG in noise_NG.split(2):
        ce_NG = torch.cat((5 + part_NG, torch.full((2, 1), 50.0, **double)), 1)
        drawn.append(least_bound(DocumentNats(times, torch.zeros(2, 3, **double), ce_NG, ones_N[:2])).nats)
    assert sum(drawn) / len(drawn) == pytest.approx(5.0, abs=0.15)
    one = DocumentNats(times, torch.zeros(1, 3, **double), torch.tensor([[1.0, 2.0, 3.0]], **double), ones_N[:1])
    assert least_bound(one).nats == 3.0


def test_contexts_are_not_counted_and_documents_keep_apart() -> None:
    """Targets alone, each in its own document, whatever stands between them."""
    frequencies_V, tokens_T = language(60)
    means_VZ, is_target_T = means(), torch.arange(60) % 20 >= 8
    is_target_T[40:] = False
    denoise = optimal(means_VZ, frequencies_V, tokens_T)
    noise_TZ = draw(60, LATENT)
    found = document_nats(
        denoise, means_VZ[tokens_T], lambda i: noise_TZ, torch.arange(60) // 20, is_target_T, (0.3, 0.6, 1.0)
    )
    assert found.tokens_N.tolist() == [12, 12]
    velocity_TZ, ce_T = denoise(flow.interpolate(means_VZ[tokens_T], noise_TZ, 0.6), torch.full((60,), 0.6, **double))
    error_T = (velocity_TZ - flow.velocity(means_VZ[tokens_T], noise_TZ)).square().sum(-1)
    # Straight from 0.6 to 1, where (1 - t) / t is 0: the last piece of the quadrature, with the slope of all three times in it.
    weights_G = quadrature((0.3, 0.6, 1.0))[1] * torch.tensor([0.7 / 0.3, 0.4 / 0.6, 0.0], **double)
    early_TZ, _ = denoise(flow.interpolate(means_VZ[tokens_T], noise_TZ, 0.3), torch.full((60,), 0.3, **double))
    early_T = (early_TZ - flow.velocity(means_VZ[tokens_T], noise_TZ)).square().sum(-1)
    flow_T = weights_G[0] * early_T + weights_G[1] * error_T
    for document, part in enumerate((slice(8, 20), slice(28, 40))):
        assert found.flow_parts_NG[document, 1] == pytest.approx(float(flow_T[part].sum()))
        assert found.cross_entropies_NG[document, 1] == pytest.approx(float(ce_T[part].sum()))
    again = DocumentNats.joined([found[0:1], found[1:2]])
    assert torch.equal(again.bounds_NG, found.bounds_NG)
    assert bound_at(again, 0) == bound_at(found, 0)


def test_the_quadrature_is_exact_for_parabolas_and_near_for_what_occurs() -> None:
    times_G = torch.tensor(GRID, **double)
    for power in (0, 1, 2):
        expected_G = (1 - times_G ** (power + 1)) / (power + 1)
        torch.testing.assert_close(quadrature(GRID) @ times_G**power, expected_G, rtol=0, atol=1e-12)
    # Errors that fall as they do where tokens become certain: (1-t)/t^3 exp(-a ((1-t)/t)^2), by substitution (1 - exp(-a SNR)) / (2 a).
    snr_G = ((1 - times_G) / times_G) ** 2
    for a in (0.5, 2.0, 8.0):
        values_G = (1 - times_G) / times_G**3 * (-a * snr_G).exp()
        torch.testing.assert_close(
            quadrature(GRID) @ values_G, (1 - (-a * snr_G).exp()) / (2 * a), rtol=0.01, atol=1e-4
        )
    with pytest.raises(ValueError, match="at least 3 rising times"):
        quadrature((0.1, 0.5, 0.4))


def test_the_error_of_a_paired_difference_has_only_what_differs() -> None:
    tokens_N = torch.tensor([10, 30, 20, 40])
    base_N = torch.tensor([50.0, 200.0, 90.0, 120.0], **double)
    mean, error = per_token(base_N + 0.25 * tokens_N - base_N, tokens_N)
    assert (mean, error) == pytest.approx((0.25, 0.0), abs=1e-12)
    assert per_token(base_N, tokens_N)[1] > 0.1
    equal_N = torch.full((4,), 20)
    assert per_token(base_N, equal_N)[1] == pytest.approx(float((base_N / 20).std()) / 2)
    assert math.isnan(per_token(base_N[:1], tokens_N[:1])[1])


def test_unigram_nats_are_the_cross_entropy_to_the_counts() -> None:
    counts_V = torch.tensor([6, 3, 0])
    expected = -(2 * math.log(6.5 / 10.5) + math.log(0.5 / 10.5)) / 3
    assert unigram_nats(counts_V, torch.tensor([0, 0, 2])) == pytest.approx(expected)
