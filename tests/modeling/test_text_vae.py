"""The TextVAE: segments do not see each other, statistics standardise, everything starts where it should."""

import pytest
import torch

from modeling.attention import Segments
from modeling.text_vae import TextVAE, TextVAEConfig

LENGTHS = [5, 1, 12]
TINY = {
    "vocab_size": 50,
    "latent_dim": 4,
    "width": 32,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "head_dim": 16,
}


def make_vae(seed: int = 0) -> TextVAE:
    """Random weights everywhere."""
    torch.manual_seed(seed)
    vae = TextVAE(TextVAEConfig(**TINY)).eval()
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return vae.requires_grad_(False)


def test_context_and_target_are_encoded_separately() -> None:
    vae, tokens_T, segments = make_vae(), torch.randint(50, (sum(LENGTHS),)), Segments.from_lengths(LENGTHS)
    other_T = tokens_T.clone()
    other_T[6:] = (other_T[6:] + 1) % 50
    for before, after in zip(vae.encode(tokens_T, segments), vae.encode(other_T, segments)):
        assert torch.equal(before[:6], after[:6])
        assert not torch.isclose(before[6:], after[6:]).any(dim=1).all()
    joined = vae.encode(tokens_T, Segments.from_lengths([6, 12]))[0]
    assert not torch.allclose(joined[:5], vae.encode(tokens_T, segments)[0][:5])  # the boundary is what separates


def test_packing_changes_nothing() -> None:
    vae, tokens_T = make_vae(), torch.randint(50, (sum(LENGTHS),))
    packed_TZ, packed_V_TZ, packed_TD = vae.encode(tokens_T, Segments.from_lengths(LENGTHS))
    alone = [vae.encode(part, Segments.from_lengths([len(part)])) for part in tokens_T.split(LENGTHS)]
    for found, parts in zip((packed_TZ, packed_V_TZ, packed_TD), zip(*alone)):
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-4)
    z_TZ, parts = torch.randn_like(packed_TZ), [Segments.from_lengths([n]) for n in LENGTHS]
    alone_TD = [vae.decode(part, segments) for part, segments in zip(z_TZ.split(LENGTHS), parts)]
    packed_TD = vae.decode(z_TZ, Segments.from_lengths(LENGTHS))
    torch.testing.assert_close(packed_TD, torch.cat(alone_TD), rtol=1e-4, atol=1e-4)
    tokens_T = vae.decode_tokens(z_TZ, Segments.from_lengths(LENGTHS), chunk=4)
    assert torch.equal(tokens_T, vae.lm_head(packed_TD).argmax(-1))


def test_standardising_and_back() -> None:
    vae, latents_TZ = make_vae(), 3 * torch.randn(200, 4) + 5
    assert torch.equal(vae.standardize(latents_TZ), latents_TZ)  # until measured
    vae.latents_mean.copy_(latents_TZ.mean(0))
    vae.latents_std.copy_(latents_TZ.std(0))
    standard_TZ = vae.standardize(latents_TZ)
    torch.testing.assert_close(standard_TZ.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(standard_TZ.std(0), torch.ones(4))
    torch.testing.assert_close(vae.unstandardize(standard_TZ), latents_TZ)
    segments = Segments.from_lengths([200])
    plain_T = vae.lm_head(vae.decode(latents_TZ, segments)).argmax(-1)
    assert torch.equal(vae.decode_tokens(standard_TZ, segments), plain_T)
    assert {"latents_mean", "latents_std"} <= vae.state_dict().keys()


def test_a_new_posterior_has_unit_variance_and_near_uniform_logits() -> None:
    torch.manual_seed(0)
    vae, tokens_T = TextVAE(TextVAEConfig(**TINY)), torch.randint(50, (18,))
    mean_TZ, log_variance_TZ, hidden_TD = vae.encode(tokens_T, Segments.from_lengths(LENGTHS))
    assert not log_variance_TZ.any()
    assert float(hidden_TD.detach().std()) == pytest.approx(1.0, abs=0.05)  # after the final norm
    logits_TV = vae.lm_head(vae.decode(mean_TZ, Segments.from_lengths(LENGTHS)))
    loss = torch.nn.functional.cross_entropy(logits_TV, tokens_T)
    # Logits of 32 normalised channels with weights N(0, 1 / (3 * 32)) have variance 1/3: E[CE] = log V + 1/6 to first order.
    assert float(loss.detach()) == pytest.approx(float(torch.tensor(50.0).log()) + 1 / 6, abs=0.15)


def test_log_variance_is_clamped() -> None:
    vae = make_vae()
    vae.to_log_variance.bias.fill_(1000.0)
    assert vae.encode(torch.arange(3), Segments.from_lengths([3]))[1].max() == 10


def test_half_precision_runs_and_stays_near() -> None:
    torch.manual_seed(0)
    vae, tokens_T, segments = TextVAE(TextVAEConfig(**TINY)), torch.randint(50, (18,)), Segments.from_lengths(LENGTHS)
    mean_TZ = vae.encode(tokens_T, segments)[0]
    decoded_TD = vae.decode(mean_TZ, segments)
    vae.bfloat16()
    half_TZ, half_V_TZ, _ = vae.encode(tokens_T, segments)
    assert half_TZ.dtype == half_V_TZ.dtype == torch.float32
    assert (half_TZ - mean_TZ).norm() < 0.02 * mean_TZ.norm()
    assert (vae.decode(mean_TZ, segments).float() - decoded_TD).norm() < 0.02 * decoded_TD.norm()


@pytest.mark.parametrize(("width", "layers"), [(64, 1), (128, 3)])
def test_parameters_are_counted_by_the_formula(width: int, layers: int) -> None:
    shape = TINY | {"width": width, "num_encoder_layers": layers, "num_decoder_layers": 2 * layers}
    with torch.device("meta"):
        vae = TextVAE(TextVAEConfig(**shape))
    matrices = sum(p.numel() for p in vae.parameters() if p.dim() == 2)
    assert matrices == 12 * width**2 * 3 * layers + 2 * 50 * width + 3 * 4 * width
    assert vae.embedding.weight is not vae.lm_head.weight
