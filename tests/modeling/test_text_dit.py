"""The TextDiT: what it sees and does not see, its parametrisations, its size, and the loss it starts from."""

import pytest
import torch

from modeling import flow
from modeling.attention import Segments
from modeling.heads import CategoricalHead, Own, TokenTargets
from modeling.losses import squared_error
from modeling.text_dit import TextDiT, TextDiTConfig

LENGTHS, CONTEXTS = [9, 6, 5], [4, 3, 0]
TINY = {"latent_dim": 3, "width": 32, "num_layers": 2, "head_dim": 16}
EVERY = [
    {},
    {"time_conditioning": "additive"},
    {"time_conditioning": "adaln_zero"},
    {"role_embedding": True, "qk_norm": True},
    {"self_conditioning": True},
    {"head": "categorical", "vocab_size": 7},
    {"head": "categorical", "vocab_size": 7, "token_embedding": True},
    {"neighbour_heads": True},
]


def make_dit(**options: object) -> TextDiT:
    """Random weights everywhere: zero ones hide errors."""
    torch.manual_seed(0)
    dit = TextDiT(TextDiTConfig(**(TINY | options))).eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if isinstance(dit.head, CategoricalHead):
        torch.nn.init.normal_(dit.head.means)
        dit.head.within_variance.fill_(0.3)
    return dit.requires_grad_(False)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Segments]:
    """Latents, where the targets are, one time a window, windows."""
    generator = torch.Generator().manual_seed(1)
    latents_TZ = torch.randn(sum(LENGTHS), 3, generator=generator)
    is_target_T = torch.cat([torch.arange(n) >= c for n, c in zip(LENGTHS, CONTEXTS)])
    windows = Segments.from_lengths(LENGTHS)
    return latents_TZ, is_target_T, torch.tensor([0.2, 0.5, 0.9])[windows.ids_T], windows


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_windows_do_not_see_each_other(options: dict) -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = make_dit(**options), inputs()
    before_TZ = dit(latents_TZ, is_target_T, time_T, windows).velocity_TZ
    changed_TZ, changed_T = latents_TZ.clone(), time_T.clone()
    changed_TZ[9:15] += 1
    changed_T[9:15] = 0.7
    after_TZ = dit(changed_TZ, is_target_T, changed_T, windows).velocity_TZ
    outside = [*range(9), *range(15, 20)]
    assert torch.equal(before_TZ[outside], after_TZ[outside])
    targets = slice(9 + CONTEXTS[1], 15)
    assert not torch.isclose(before_TZ[targets], after_TZ[targets]).all(-1).any()
    start = 0
    for length in LENGTHS:
        part = slice(start, start + length)
        alone_TZ = dit(latents_TZ[part], is_target_T[part], time_T[part], Segments.from_lengths([length])).velocity_TZ
        torch.testing.assert_close(alone_TZ, before_TZ[part], rtol=1e-4, atol=1e-4)
        start += length


def test_targets_see_context_and_each_other() -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = make_dit(), inputs()
    before_TZ = dit(latents_TZ, is_target_T, time_T, windows).velocity_TZ
    for token in (0, 8):  # a context and a target of the first window
        changed_TZ = latents_TZ.clone()
        changed_TZ[token] += 1
        after_TZ = dit(changed_TZ, is_target_T, time_T, windows).velocity_TZ
        assert not torch.isclose(before_TZ[4:9], after_TZ[4:9]).all(-1).any()


def test_without_time_conditioning_the_time_is_not_read() -> None:
    latents_TZ, is_target_T, time_T, windows = inputs()
    plain, timed = make_dit(), make_dit(time_conditioning="additive")
    assert torch.equal(
        plain(latents_TZ, is_target_T, time_T, windows).velocity_TZ,
        plain(latents_TZ, is_target_T, time_T / 2, windows).velocity_TZ,
    )
    before_TZ, after_TZ = (timed(latents_TZ, is_target_T, x, windows).velocity_TZ for x in (time_T, time_T / 2))
    assert not torch.allclose(before_TZ, after_TZ)
    # A context's own time is 0: only targets carry the embedding.
    context_T = torch.where(is_target_T, time_T, 0.123)
    assert torch.equal(before_TZ, timed(latents_TZ, is_target_T, context_T, windows).velocity_TZ)


@pytest.mark.parametrize("options", [{}, {"token_embedding": True}], ids=str)
def test_a_categorical_head_reads_what_each_latent_tells_alone_where_no_earlier_estimate_is_given(
    options: dict,
) -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = make_dit(head="categorical", vocab_size=7, **options), inputs()
    places_M, time_T1 = is_target_T.nonzero()[:, 0], (time_T * is_target_T)[:, None]
    own = dit.alone(latents_TZ, time_T1, places_M)
    found_TD = dit(latents_TZ, is_target_T, time_T, windows).hidden_TD
    assert torch.equal(found_TD, dit(latents_TZ, is_target_T, time_T, windows, own=own).hidden_TD)
    assert torch.equal(found_TD, dit(latents_TZ, is_target_T, time_T, windows, own.estimate_TZ).hidden_TD)
    others = [Own(torch.zeros_like(own.estimate_TZ), own.embedding_TD)]
    if own.embedding_TD is not None:
        others.append(Own(own.estimate_TZ, own.embedding_TD * is_target_T[:, None]))
    for other in others:
        assert not torch.allclose(found_TD, dit(latents_TZ, is_target_T, time_T, windows, own=other).hidden_TD)


def test_at_first_a_categorical_heads_network_reads_no_noise() -> None:
    latents_TZ, is_target_T, time_T, windows = inputs()
    dit = TextDiT(TextDiTConfig(**TINY, head="categorical", vocab_size=7))
    own = dit.alone(latents_TZ, (time_T * is_target_T)[:, None], is_target_T.nonzero()[:, 0])
    other_TZ = latents_TZ + is_target_T[:, None]
    found_TD = dit(latents_TZ, is_target_T, time_T, windows, own=own).hidden_TD
    assert torch.equal(found_TD, dit(other_TZ, is_target_T, time_T, windows, own=own).hidden_TD)
    assert dit.from_latent.weight[:, 3:].all(), "what it reads of contexts and estimates"


def test_targets_that_are_named_are_those_that_the_mask_says() -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = make_dit(head="categorical", vocab_size=7), inputs()
    places_M = is_target_T.nonzero()[:, 0]
    tokens_M = torch.arange(len(places_M)) % 7
    found = dit(latents_TZ, is_target_T, time_T, windows, targets=TokenTargets(places_M, tokens_M))
    plain_TZ = dit(latents_TZ, is_target_T, time_T, windows).velocity_TZ
    torch.testing.assert_close(found.velocity_TZ, plain_TZ, rtol=1e-4, atol=1e-5)
    assert found.token_ce_M.shape == (len(places_M),)


def test_the_estimate_is_that_of_the_velocity_down_to_the_clamp() -> None:
    velocity_TZ, noisy_TZ = torch.randn(2, 5, 3)
    time_T = torch.tensor([0.9, 0.5, flow.MIN_TIME, flow.MIN_TIME / 10, 0.0])
    expected_TZ = noisy_TZ - time_T.clamp_min(flow.MIN_TIME)[:, None] * velocity_TZ
    torch.testing.assert_close(make_dit().estimate(velocity_TZ, noisy_TZ, time_T), expected_TZ)


def test_self_conditioning_reads_targets_only_and_zeros_when_there_is_none() -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = make_dit(self_conditioning=True), inputs()
    none_TZ = dit(latents_TZ, is_target_T, time_T, windows).velocity_TZ
    assert torch.equal(none_TZ, dit(latents_TZ, is_target_T, time_T, windows, torch.zeros_like(latents_TZ)).velocity_TZ)
    at_contexts_TZ = torch.randn_like(latents_TZ) * ~is_target_T[:, None]
    assert torch.equal(none_TZ, dit(latents_TZ, is_target_T, time_T, windows, at_contexts_TZ).velocity_TZ)
    assert not torch.allclose(
        none_TZ, dit(latents_TZ, is_target_T, time_T, windows, torch.ones_like(latents_TZ)).velocity_TZ
    )


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_the_first_loss_is_its_analytic_value(options: dict) -> None:
    """Zero-initialised, the velocity is 0 or the blind one; the loss follows from the batch's second moments."""
    torch.manual_seed(0)
    dit, num = TextDiT(TextDiTConfig(**(TINY | options))), 20_000
    data_TZ, noise_TZ = 1.7 * torch.randn(num, 3), torch.randn(num, 3)
    is_target_T, time = torch.ones(num, dtype=torch.bool), 0.4
    time_T, windows = torch.full((num,), time), Segments.from_lengths([20] * (num // 20))
    with torch.no_grad():
        found_TZ = dit(flow.interpolate(data_TZ, noise_TZ, time_T[:, None]), is_target_T, time_T, windows).velocity_TZ
    loss = float(squared_error(found_TZ, flow.velocity(data_TZ, noise_TZ)).mean())
    power = float(data_TZ.square().mean())
    # v - v* = a z + b eps with independent z and eps, so the loss is a^2 E[z^2] + b^2.
    if options.get("head") == "categorical":  # without statistics, every token is the unit Gaussian
        slope = (2 * time - 1) / (time**2 + (1 - time) ** 2)
        a, b = slope * (1 - time) + 1, slope * time - 1
    else:
        a, b = 1.0, -1.0
    assert loss == pytest.approx(a**2 * power + b**2, rel=0.03)


def test_velocity_prediction_starts_at_the_batchs_own_second_moment() -> None:
    dit, (latents_TZ, is_target_T, time_T, windows) = TextDiT(TextDiTConfig(**TINY)), inputs()
    noise_TZ = torch.randn_like(latents_TZ)
    noisy_TZ = flow.interpolate(latents_TZ, noise_TZ, time_T[:, None])
    target_TZ = flow.velocity(latents_TZ, noise_TZ)
    error_T = squared_error(dit(noisy_TZ, is_target_T, time_T, windows).velocity_TZ, target_TZ)
    torch.testing.assert_close(error_T, target_TZ.square().mean(-1))


@pytest.mark.parametrize(
    ("layers", "width", "millions"),
    [(16, 768, 113), (26, 1024, 327), (39, 1280, 767), (24, 2560, 1888), (32, 4096, 6442)],
)
def test_the_ladder_has_its_sizes(layers: int, width: int, millions: int) -> None:
    with torch.device("meta"):
        dit = TextDiT(TextDiTConfig(width=width, num_layers=layers))
    matrices = sum(p.numel() for p in dit.transformer.parameters() if p.dim() == 2)
    assert matrices == 12 * width**2 * layers
    assert sum(p.numel() for p in dit.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("options", EVERY, ids=str)
def test_half_precision_runs_and_stays_near(options: dict) -> None:
    torch.manual_seed(0)
    dit, (latents_TZ, is_target_T, time_T, windows) = TextDiT(TextDiTConfig(**(TINY | options))), inputs()
    head = dit.head.to_shift if isinstance(dit.head, CategoricalHead) else dit.head.to_latent
    torch.nn.init.normal_(head.weight, std=0.1)
    estimate_TZ = torch.randn_like(latents_TZ) if options.get("self_conditioning") else None
    full_TZ = dit(latents_TZ, is_target_T, time_T, windows, estimate_TZ).velocity_TZ
    half_TZ = dit.bfloat16()(latents_TZ, is_target_T, time_T, windows, estimate_TZ).velocity_TZ
    assert half_TZ.dtype == torch.float32
    assert (half_TZ - full_TZ).norm() < 0.02 * full_TZ.norm()


@pytest.mark.parametrize(
    "wrong", [{"time_conditioning": "film"}, {"head": "noise"}, {"neighbour_heads": True, "qk_norm": True}]
)
def test_unknown_options_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"expected (none, additive or adaln_zero|velocity or categorical)|choose one"):
        TextDiTConfig(**wrong)


def test_a_token_embedding_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="token_embedding needs head=categorical"):
        TextDiTConfig(token_embedding=True)
