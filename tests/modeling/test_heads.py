"""The categorical head: Bayes' rule in closed form, checked against brute force in float64, and what the network's numbers do to it."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modeling import flow
from modeling.heads import CategoricalHead, TokenTargets
from modeling.layers import initialize
from modeling.likelihood import Denoised, DocumentNats, document_nats, least_bound, time_grid, told_latents
from modeling.token_statistics import log_frequencies, token_statistics

WIDTH, LATENT, VOCAB, TOKENS = 8, 3, 5, 60
FREQUENCIES_V = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04], dtype=torch.float64)
WITHIN_Z = torch.tensor([0.02, 0.1, 0.3])


def make_head(scale: float = 1.0) -> CategoricalHead:
    """Known statistics; `scale` of the learned weights, 0 as at the start."""
    torch.manual_seed(0)
    head = CategoricalHead(WIDTH, LATENT, VOCAB)
    initialize(head)
    for weight in head.parameters():
        torch.nn.init.normal_(weight, std=scale)
    head.means.copy_(torch.randn(VOCAB, LATENT))
    head.log_frequencies.copy_(FREQUENCIES_V.log())
    head.within_variance.copy_(WITHIN_Z)
    return head


def inputs(time: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """Noisy latents of random tokens, at two thirds of the places."""
    generator = torch.Generator().manual_seed(seed)
    head = make_head()
    tokens_T = torch.multinomial(FREQUENCIES_V, TOKENS, replacement=True, generator=generator)
    clean_TZ = head.means[tokens_T] + WITHIN_Z.sqrt() * torch.randn(TOKENS, LATENT, generator=generator)
    noise_TZ = torch.randn(TOKENS, LATENT, generator=generator)
    places_M = (torch.arange(TOKENS) % 3 > 0).nonzero()[:, 0]
    return {
        "hidden_TD": torch.randn(TOKENS, WIDTH, generator=generator),
        "latents_TZ": flow.interpolate(clean_TZ, noise_TZ, time),
        "time_T1": torch.full((TOKENS, 1), time),
        "places_M": places_M,
        "tokens_M": tokens_T[places_M],
    }


def brute_force(head: CategoricalHead, given: dict[str, torch.Tensor], temperature: float = 1.0):  # type: ignore[no-untyped-def]
    """(logits up to a constant, E[z | z_t]) of the targets, from densities in float64, token by token."""
    weights = {name: tensor.detach().double() for name, tensor in head.state_dict().items()}
    hidden_MD, noisy_MZ = (given[name][given["places_M"]].double() for name in ("hidden_TD", "latents_TZ"))
    t, within_Z = float(given["time_T1"][0, 0]), weights["within_variance"]
    spread = torch.distributions.Normal((1 - t) * weights["means"], ((1 - t) ** 2 * within_Z + t**2).sqrt())
    logits_MV = spread.log_prob(noisy_MZ[:, None]).sum(-1) + weights["log_frequencies"]
    logits_MV = logits_MV + hidden_MD @ weights["to_logits.weight"].T
    shift_MZ = within_Z.sqrt() * (hidden_MD @ weights["to_shift.weight"].T + weights["to_shift.bias"])
    gain_Z = (1 - t) * within_Z / ((1 - t) ** 2 * within_Z + t**2)
    estimates = [m + shift_MZ + gain_Z * (noisy_MZ - (1 - t) * (m + shift_MZ)) for m in weights["means"]]
    share_MV = (logits_MV / temperature).softmax(-1)
    return logits_MV, (share_MV[..., None] * torch.stack(estimates, 1)).sum(1)


@pytest.mark.parametrize("time", [0.03, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_velocity_and_cross_entropies_are_those_of_bayes_rule(time: float, temperature: float) -> None:
    head, given = make_head(), inputs(time)
    logits_MV, estimate_MZ = brute_force(head, given, temperature)
    noisy_MZ = given["latents_TZ"][given["places_M"]].double()
    places_M, tokens_M = given.pop("places_M"), given.pop("tokens_M")
    sampled = head(**given, places_M=places_M, temperature=temperature)
    found_MZ = flow.data_from_velocity(noisy_MZ, sampled.velocity_TZ[places_M].double(), time)
    torch.testing.assert_close(found_MZ, estimate_MZ, rtol=1e-3, atol=2e-4)
    assert not sampled.velocity_TZ[0::3].any(), "contexts move"
    assert sampled.token_loss is None
    trained = head(**given, places_M=places_M, tokens_M=tokens_M, temperature=temperature)
    torch.testing.assert_close(trained.velocity_TZ, sampled.velocity_TZ, rtol=1e-4, atol=1e-5)
    expected_M = F.cross_entropy(logits_MV / temperature, tokens_M, reduction="none")
    torch.testing.assert_close(trained.token_ce_M.double(), expected_M, rtol=1e-3, atol=1e-3 / temperature)
    torch.testing.assert_close(trained.token_loss.detach(), trained.token_ce_M.sum())


@pytest.mark.parametrize("time", [0.05, 0.6])
def test_alone_is_the_estimate_of_a_network_that_says_nothing(time: float) -> None:
    head, given = make_head(0.0), inputs(time)
    own = make_head().alone(given["latents_TZ"], given["time_T1"], given["places_M"])
    alone_TZ, embedding_TD = own
    assert embedding_TD is None
    _, estimate_MZ = brute_force(head, given)
    torch.testing.assert_close(alone_TZ[given["places_M"]].double(), estimate_MZ, rtol=1e-3, atol=2e-4)
    assert not alone_TZ[0::3].any()


@pytest.mark.parametrize("time", [0.05, 0.6])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_an_embedding_is_averaged_over_what_each_latent_says_by_itself(
    time: float, dtype: torch.dtype, error: float
) -> None:
    """Contexts are read at t = 0; zero latents have no embedding, and the gradient is that of the plain sum."""
    head, given = make_head(0.0), inputs(time)
    latents_TZ, time_T1, places_M = given["latents_TZ"], given["time_T1"], given["places_M"]
    latents_TZ[3] = 0  # a dropped context
    embedding_VD = torch.randn(VOCAB, 5).to(dtype).requires_grad_()
    own = head.alone(latents_TZ, time_T1, places_M, embedding_VD)
    without_TZ = head.alone(latents_TZ, time_T1, places_M).estimate_TZ
    torch.testing.assert_close(own.estimate_TZ, without_TZ, rtol=error, atol=error)
    assert (own.estimate_TZ.dtype, own.embedding_TD.dtype) == (torch.float32, dtype)
    plain_VD = embedding_VD.detach().double().requires_grad_()
    signal_T1 = 1 - time_T1.double()
    spread_TZ = signal_T1.square() * head.within_variance.double() + time_T1.double().square()
    errors_TVZ = latents_TZ.double()[:, None] - signal_T1[..., None] * head.means.double()
    logits_TV = head.log_frequencies.double() - 0.5 * (errors_TVZ.square() / spread_TZ[:, None]).sum(-1)
    expected_TD = logits_TV.softmax(-1) @ plain_VD * (torch.arange(len(latents_TZ)) != 3)[:, None]
    torch.testing.assert_close(own.embedding_TD.double(), expected_TD, rtol=error, atol=error)
    weights_TD = torch.randn(expected_TD.shape)
    (own.embedding_TD * weights_TD).sum().backward()
    (expected_TD * weights_TD).sum().backward()
    torch.testing.assert_close(embedding_VD.grad.double(), plain_VD.grad, rtol=error, atol=error)
    assert not own.estimate_TZ.requires_grad


def test_the_velocitys_loss_reaches_the_logits_only_through_the_mean() -> None:
    for through_mean in (False, True):
        head, given = make_head(), inputs(0.5)
        head.through_mean = through_mean
        head(**given).velocity_TZ.square().sum().backward()
        assert head.to_shift.weight.grad.any()
        assert bool(head.to_logits.weight.grad is not None and head.to_logits.weight.grad.any()) == through_mean


def test_all_of_it_is_the_same_under_autocast() -> None:
    """Its logits near t = 0 are differences of large numbers, of which bf16 would leave nothing."""
    head, given = make_head(0.0), inputs(0.03)
    expected, own = head(**given), head.alone(given["latents_TZ"], given["time_T1"], given["places_M"])
    with torch.autocast("cpu", torch.bfloat16):
        found = head(**given)
        again = head.alone(given["latents_TZ"], given["time_T1"], given["places_M"])
        torch.testing.assert_close(again.estimate_TZ, own.estimate_TZ)
    torch.testing.assert_close(found.velocity_TZ, expected.velocity_TZ)
    torch.testing.assert_close(found.token_ce_M, expected.token_ce_M)


def bound_curve(head: CategoricalHead, tokens_T: torch.Tensor, latents_TZ: torch.Tensor) -> DocumentNats:
    """The bound of independent tokens under a head whose network says nothing, measured from these latents."""
    num = len(tokens_T)
    places_T, hidden_TD = torch.arange(num), torch.zeros(num, WIDTH)

    def denoise(noisy_TZ: torch.Tensor, time_T: torch.Tensor) -> Denoised:
        found = head(hidden_TD, noisy_TZ, time_T[:, None], places_T, tokens_T)
        return Denoised(found.velocity_TZ, found.token_ce_M)

    def noise_of(index: int) -> torch.Tensor:
        return torch.randn(num, LATENT, generator=torch.Generator().manual_seed(index))

    everything_T = torch.ones(num, dtype=torch.bool)
    return document_nats(denoise, latents_TZ, noise_of, places_T // 100, everything_T, time_grid())


ENTROPY = -float((FREQUENCIES_V * FREQUENCIES_V.log()).sum())


def test_without_context_the_bound_is_the_entropy_of_the_frequencies() -> None:
    """Independent tokens, a network that says nothing: what lies above the entropy is the variance within tokens, here almost none."""
    num, generator = 20_000, torch.Generator().manual_seed(3)
    head = make_head(0.0)
    head.within_variance.fill_(1e-4)
    tokens_T = torch.multinomial(FREQUENCIES_V, num, replacement=True, generator=generator)
    clean_TZ = head.means[tokens_T] + 1e-2 * torch.randn(num, LATENT, generator=generator)
    found = bound_curve(head, tokens_T, clean_TZ)
    assert least_bound(found).nats == pytest.approx(ENTROPY, rel=0.01)
    assert found.curve[4:] == pytest.approx([ENTROPY] * 20, rel=0.02)


def test_measured_from_the_tokens_means_the_bound_pays_nothing_for_what_lies_within_them() -> None:
    """The same model and tokens: any latents bound it, and none of them from below."""
    num, generator = 20_000, torch.Generator().manual_seed(3)
    head = make_head(0.0)
    head.within_variance.copy_(0.1 * WITHIN_Z)
    tokens_T = torch.multinomial(FREQUENCIES_V, num, replacement=True, generator=generator)
    encoded_TZ = head.means[tokens_T] + (0.1 * WITHIN_Z).sqrt() * torch.randn(num, LATENT, generator=generator)
    targets = TokenTargets(torch.arange(num // 2), tokens_T[: num // 2])
    told_TZ = told_latents(SimpleNamespace(head=head), encoded_TZ, targets)  # type: ignore[arg-type]
    assert torch.equal(told_TZ[: num // 2], head.means[targets.tokens_M])
    assert torch.equal(told_TZ[num // 2 :], encoded_TZ[num // 2 :])
    assert told_latents(SimpleNamespace(head=None), encoded_TZ, targets) is encoded_TZ  # type: ignore[arg-type]
    encoded, told = (torch.tensor(bound_curve(head, tokens_T, x).curve) for x in (encoded_TZ, head.means[tokens_T]))
    assert told.min() > ENTROPY * 0.99
    early = 3  # of the grid's times: t = 0.21, where latents have begun to show how they differ within a token
    assert encoded[early] > told[early] + 0.05


def test_what_it_knows_of_tokens_is_found_again_in_their_latents() -> None:
    head, generator = make_head(0.0), torch.Generator().manual_seed(4)
    tokens_M = torch.multinomial(FREQUENCIES_V, 20_000, replacement=True, generator=generator)
    latents_MZ = head.means[tokens_M] + WITHIN_Z.sqrt() * torch.randn(20_000, LATENT, generator=generator)
    fitted = CategoricalHead(WIDTH, LATENT, VOCAB)
    statistics = token_statistics(latents_MZ, tokens_M, torch.zeros(VOCAB, LATENT))
    statistics["log_frequencies"] = log_frequencies(torch.bincount(tokens_M))
    assert statistics.keys() == dict(fitted.named_buffers()).keys()
    for name, tensor in statistics.items():
        torch.testing.assert_close(tensor, head.get_buffer(name), rtol=0.05, atol=0.03)
