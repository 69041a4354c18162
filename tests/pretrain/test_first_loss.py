"""The first step's loss is known before any training, for every shipped configuration: its shape with fewer, narrower layers."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from modeling import flow, losses
from modeling.attention import Segments
from modeling.text_dit import TextDiT
from modeling.text_vae import TextVAE
from modeling.token_transformer import TokenTransformer
from pretrain.config.load import load_config
from pretrain.stages.dit import times_of
from pretrain.stages.dit_config import DiTRun
from pretrain.stages.token_config import TokenRun
from pretrain.stages.vae_config import VAERun

CONFIGS = {
    path.stem: load_config(path) for path in sorted(Path(__file__).parents[2].joinpath("configs").glob("*.json"))
}
TOKENS = 2048


def smaller(architecture, **counts):  # type: ignore[no-untyped-def]
    """The architecture with all its options, at a width that a test can afford."""
    head_dim = min(architecture.head_dim, 64)
    return dataclasses.replace(architecture, width=4 * head_dim, head_dim=head_dim, **counts)


def segments() -> Segments:
    return Segments.from_lengths([TOKENS // 8] * 8)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, DiTRun)])
def test_a_dit_starts_at_the_loss_of_what_it_predicts_without_weights(name: str) -> None:
    config = CONFIGS[name]
    assert isinstance(config, DiTRun)
    torch.manual_seed(0)
    shape = smaller(config.model.architecture(), num_layers=2)
    shape.vocab_size = 64
    dit = TextDiT(shape)
    data_TZ, noise_TZ = torch.randn(2, TOKENS, shape.latent_dim)
    uniform_T = (torch.arange(TOKENS) + 0.5) / TOKENS
    time_T = times_of(config.flow).quantile(uniform_T).float()
    is_target_T = torch.ones(TOKENS, dtype=torch.bool)
    noisy_TZ = flow.interpolate(data_TZ, noise_TZ, time_T[:, None])
    velocity_TZ = dit(noisy_TZ, is_target_T, time_T, segments()).velocity_TZ
    loss = float(losses.squared_error(velocity_TZ, flow.velocity(data_TZ, noise_TZ)).mean())
    if shape.head == "velocity":  # v = 0
        expected = 2.0
    else:  # categorical: one Gaussian N(0, 1) before statistics are read, that is the blind floor
        expected = float(flow.blind_floor(time_T).mean())
    assert loss == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, VAERun)])
def test_a_vae_starts_near_the_logarithm_of_its_vocabulary(name: str) -> None:
    config = CONFIGS[name]
    assert isinstance(config, VAERun)
    torch.manual_seed(0)
    shape = smaller(config.model.architecture(), num_encoder_layers=1, num_decoder_layers=1)
    shape.vocab_size = 5000
    vae = TextVAE(shape)
    tokens_T = torch.randint(shape.vocab_size, (TOKENS,))
    mean_TZ, log_variance_TZ, _ = vae.encode(tokens_T, segments())
    decoded_TD = vae.decode(mean_TZ + torch.randn_like(mean_TZ), segments())
    ce_sum, _ = losses.linear_cross_entropy(decoded_TD, vae.lm_head.weight, tokens_T, torch.ones(TOKENS))
    # Logits are N(0, s^2) over the vocabulary, since the decoder's output has unit variance and the head's rows are random:
    # E log sum exp = log V + s^2 / 2, and a random token's own logit is 0 on average.
    spread = shape.width * float(vae.lm_head.weight.detach().square().mean())
    assert float(ce_sum / TOKENS) == pytest.approx(math.log(shape.vocab_size) + spread / 2, rel=0.02)
    # sigma = 1, so the KL is that of the mean alone.
    assert not log_variance_TZ.any()
    kl = losses.kl_to_standard_normal(mean_TZ, log_variance_TZ).sum(-1).mean()
    torch.testing.assert_close(kl, 0.5 * mean_TZ.square().sum(-1).mean())


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, TokenRun)])
def test_a_baseline_starts_at_the_logarithm_of_its_vocabulary(name: str) -> None:
    config = CONFIGS[name]
    assert isinstance(config, TokenRun)
    shape = smaller(config.model.architecture(), num_layers=1)
    shape.vocab_size = 5000
    model = TokenTransformer(shape)
    tokens_T = torch.randint(shape.vocab_size, (TOKENS,))
    nats_T = model.token_nats(model(tokens_T, segments()), tokens_T)
    torch.testing.assert_close(nats_T, torch.full_like(nats_T, math.log(shape.vocab_size)))
