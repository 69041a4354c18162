"""Guidance is the combination that it says, of velocities with and without a context."""

import pytest
import torch

from modeling.attention import Segments
from modeling.guidance import GuidedVelocity, guide
from modeling.heads import CategoricalHead
from modeling.text_dit import TextDiT, TextDiTConfig


def test_guidance_scales() -> None:
    conditional_TZ, unconditional_TZ = torch.randn(2, 4, 3)
    torch.testing.assert_close(guide(conditional_TZ, unconditional_TZ, 1.0), conditional_TZ)
    torch.testing.assert_close(guide(conditional_TZ, unconditional_TZ, 0.0), unconditional_TZ)
    farther_TZ = guide(conditional_TZ, unconditional_TZ, 3.0) - conditional_TZ
    torch.testing.assert_close(farther_TZ, 2 * (conditional_TZ - unconditional_TZ))


LENGTHS, CONTEXTS = [7, 5, 4], [3, 2, 0]


def make_dit(**options: object) -> TextDiT:
    """Random weights everywhere, so that every input matters."""
    torch.manual_seed(0)
    dit = TextDiT(TextDiTConfig(latent_dim=3, width=16, num_layers=2, head_dim=8, **options)).eval()
    for p in dit.parameters():
        torch.nn.init.normal_(p, std=0.4)
    if isinstance(dit.head, CategoricalHead):
        torch.nn.init.normal_(dit.head.means)
    return dit.requires_grad_(False)


def packed() -> tuple[torch.Tensor, torch.Tensor, Segments]:
    """Context latents with rubbish at the targets, which must not be read; where targets are; windows."""
    is_target_T = torch.cat([torch.arange(n) >= c for n, c in zip(LENGTHS, CONTEXTS)])
    return torch.randn(sum(LENGTHS), 3), is_target_T, Segments.from_lengths(LENGTHS)


TOKENS: dict[str, object] = {"head": "categorical", "vocab_size": 5}
OPTIONS: list[dict[str, object]] = [
    {},
    {"time_conditioning": "adaln_zero"},
    TOKENS,
    TOKENS | {"token_embedding": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_guidance_combines_with_and_without_context(options: dict[str, object]) -> None:
    dit, (context_TZ, is_target_T, windows), t = make_dit(**options), packed(), 0.6
    z_TZ, time_T = torch.randn_like(context_TZ), torch.full((sum(LENGTHS),), t)
    target_T1 = is_target_T[:, None]
    with_TZ = dit(torch.where(target_T1, z_TZ, context_TZ), is_target_T, time_T, windows).velocity_TZ * target_T1
    without_TZ = dit(z_TZ * target_T1, is_target_T, time_T, windows).velocity_TZ * target_T1
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
    with_TZ = dit(inputs_TZ, is_target_T, time_T, windows, estimate_TZ).velocity_TZ
    without_TZ = dit(z_TZ * is_target_T[:, None], is_target_T, time_T, windows, estimate_TZ).velocity_TZ
    expected_TZ = guide(with_TZ, without_TZ, 3.0) * is_target_T[:, None]
    torch.testing.assert_close(velocity(z_TZ, 0.5), expected_TZ, rtol=1e-4, atol=1e-4)
    fresh_TZ = GuidedVelocity(dit, context_TZ, is_target_T, windows, 3.0)(z_TZ, 0.5)
    assert not torch.allclose(fresh_TZ, expected_TZ, atol=1e-3)


def test_a_temperature_sharpens_the_tokens_probabilities() -> None:
    """Near zero, the estimate of z is the mean of the likeliest token, moved within it."""
    dit, (context_TZ, is_target_T, windows) = make_dit(head="categorical", vocab_size=5), packed()
    z_TZ, t = torch.randn_like(context_TZ), 0.6
    assert isinstance(dit.head, CategoricalHead)
    dit.head.within_variance.fill_(1e-6)
    near, plain = (
        GuidedVelocity(dit, context_TZ, is_target_T, windows, token_temperature=x)(z_TZ, t)[is_target_T]
        for x in (1e-4, 1.0)
    )
    gaps_NV = torch.cdist(z_TZ[is_target_T] - t * near, dit.head.means)
    assert float(gaps_NV.amin(-1).max()) < 0.02
    assert not torch.allclose(near, plain, atol=1e-2)
    with pytest.raises(
        ValueError, match="token_temperature is 2; expected more than 0, and 1 with this DiT's head velocity"
    ):
        GuidedVelocity(make_dit(), context_TZ, is_target_T, windows, token_temperature=2.0)
    with pytest.raises(ValueError, match="token_temperature is 0; expected more than 0"):
        GuidedVelocity(dit, context_TZ, is_target_T, windows, token_temperature=0.0)
