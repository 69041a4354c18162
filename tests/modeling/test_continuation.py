"""Contexts, noise and flow put together once: as written out window by window, and with an empty context."""

import pytest
import torch

from modeling.attention import Segments
from modeling.beyond_window import block_sizes, latest
from modeling.continuation import decode_targets, sample_targets
from modeling.guidance import GuidedVelocity
from modeling.solvers import integrate
from modeling.text_dit import TextDiT, TextDiTConfig
from modeling.text_vae import TextVAE, TextVAEConfig

TIMES = [1.0, 0.7, 0.4, 0.0]
CONTEXTS = [torch.tensor([3, 4, 5]), torch.zeros(0, dtype=torch.int64), torch.tensor([7])]
LENGTHS = [4, 2, 5]


@pytest.fixture(scope="module")
def models() -> tuple[TextVAE, TextDiT]:
    """With random weights everywhere: a zero head would make every velocity nought."""
    torch.manual_seed(0)
    vae = TextVAE(
        TextVAEConfig(vocab_size=16, latent_dim=4, width=32, num_encoder_layers=1, num_decoder_layers=1, head_dim=16)
    )
    dit = TextDiT(TextDiTConfig(latent_dim=4, width=32, num_layers=1, head_dim=16))
    with torch.no_grad():
        for p in (*vae.parameters(), *dit.parameters()):
            p.normal_(std=0.2)
        vae.latents_mean.normal_()
        vae.latents_std.uniform_(0.5, 2)
    return vae.eval().requires_grad_(False), dit.eval().requires_grad_(False)


def test_a_window_is_continued_as_it_is_alone(models: tuple[TextVAE, TextDiT]) -> None:
    vae, dit = models
    noise = [torch.randn(length, 4, generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    seen = []
    found_NZ = sample_targets(
        vae, dit, CONTEXTS, noise, TIMES, solver="heun", guidance_scale=2.0,
        on_step=lambda step, t, estimate_NZ: seen.append((step, t, len(estimate_NZ))),
    )  # fmt: skip
    assert seen == [(0, 1.0, 11), (1, 0.7, 11), (2, 0.4, 11)]
    tokens = decode_targets(vae, found_NZ, LENGTHS)
    for context_T, eps_NZ, part_NZ, tokens_T in zip(CONTEXTS, noise, found_NZ.split(LENGTHS), tokens, strict=True):
        context_TZ = torch.zeros(0, 4)
        if len(context_T):
            context_TZ = vae.standardize(vae.encode(context_T, Segments.from_lengths([len(context_T)]))[0])
        windows = Segments.from_lengths([len(context_T) + len(eps_NZ)])
        is_target_T = torch.arange(windows.num_tokens) >= len(context_T)
        latents_TZ = torch.cat((context_TZ, torch.zeros_like(eps_NZ)))
        velocity = GuidedVelocity(dit, latents_TZ, is_target_T, windows, 2.0)
        alone_TZ = integrate(velocity, torch.cat((torch.zeros_like(context_TZ), eps_NZ)), TIMES, "heun")
        assert torch.allclose(part_NZ, alone_TZ[len(context_T) :], atol=1e-5)
        assert torch.equal(tokens_T, vae.decode_tokens(part_NZ, Segments.from_lengths([len(eps_NZ)])))


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.75)])
def test_tokens_with_times_of_their_own_see_each_other_at_these_times(
    models: tuple[TextVAE, TextDiT], interval: tuple[float, float]
) -> None:
    """Two Euler steps written out, and guidance where each token's own time lies in its interval."""
    vae, dit = models
    eps_NZ, offsets_N = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.linspace(-2, 2, 5)
    context_T = torch.tensor([7])
    options = {"guidance_scale": 3.0, "guidance_interval": interval}
    found_NZ = sample_targets(vae, dit, [context_T], [eps_NZ], [1.0, 0.5, 0.0], offsets=[offsets_N], **options)
    context_TZ = vae.standardize(vae.encode(context_T, Segments.from_lengths([1]))[0])
    windows, is_target_T, z_NZ = Segments.from_lengths([6]), torch.arange(6) > 0, eps_NZ
    half_N = offsets_N.sigmoid()
    for time_N, next_N in ((torch.ones(5), half_N), (half_N, torch.zeros(5))):
        time_T = torch.cat((torch.zeros(1), time_N))
        with_NZ, without_NZ = (
            dit(torch.cat((x, z_NZ)), is_target_T, time_T, windows).velocity_TZ[1:]
            for x in (context_TZ, torch.zeros_like(context_TZ))
        )
        inside_N1 = ((time_N >= interval[0]) & (time_N <= interval[1]))[:, None]
        velocity_NZ = torch.where(inside_N1, without_NZ + 3 * (with_NZ - without_NZ), with_NZ)
        z_NZ = z_NZ + (next_N - time_N)[:, None] * velocity_NZ
    torch.testing.assert_close(found_NZ, z_NZ, rtol=1e-5, atol=1e-5)
    assert interval[0] == 0 or 0 < int(((half_N >= interval[0]) & (half_N <= interval[1])).sum()) < 5
    common_NZ = sample_targets(vae, dit, [context_T], [eps_NZ], [1.0, 0.5, 0.0], **options)
    assert (common_NZ - found_NZ).abs().max() > 1e-3


def test_without_any_context(models: tuple[TextVAE, TextDiT]) -> None:
    noise = [torch.ones(2, 4), torch.zeros(3, 4)]
    empty = torch.zeros(0, dtype=torch.int64)
    assert sample_targets(*models, [empty, empty], noise, TIMES).shape == (5, 4)


def test_blocks_are_one_where_all_fits_and_half_a_window_where_it_does_not() -> None:
    assert block_sizes(20, 12, 32) == [12]
    assert block_sizes(20, 13, 32) == [13]
    assert block_sizes(20, 40, 32) == [16, 16, 8]
    assert block_sizes(0, 7, 32, 3) == [3, 3, 1]
    text_T = torch.arange(40)
    assert latest(text_T, 16, 32).tolist() == list(range(24, 40))
    assert latest(text_T, 32, 32).tolist() == []
    assert latest(text_T[:5], 16, 32).tolist() == list(range(5))
