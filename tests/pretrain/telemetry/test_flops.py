"""FLOPs by formula against torch's count of every matrix product, forward and backward."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling.attention import Segments
from modeling.heads import CategoricalHead, TokenTargets
from modeling.shapes import TextDiTConfig, TextVAEConfig
from modeling.text_dit import TextDiT
from pretrain.telemetry.flops import dit_flops


def of_addmm(_own: tuple, left: tuple[int, int], right: tuple[int, int], *_: object, **_named: object) -> int:
    """By shapes."""
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: of_addmm}
"""What torch's counter does not know by itself."""

LENGTHS, CONTEXTS = [64, 96, 32], [16, 48, 0]
VOCABULARY = 512


def counted(config: TextDiTConfig) -> tuple[int, float]:
    """FLOPs of a training step as counted, of matrix products alone, and by formula without the VAE's encoder."""
    dit, windows = TextDiT(config), Segments.from_lengths(LENGTHS)
    torch.nn.init.normal_(dit.from_latent.weight)
    if isinstance(dit.head, CategoricalHead):
        torch.nn.init.normal_(dit.head.means)
        dit.head.within_variance.fill_(0.3)
    is_target_T = torch.cat([torch.arange(n) >= c for n, c in zip(LENGTHS, CONTEXTS)])
    places_M = is_target_T.nonzero()[:, 0]
    targets = TokenTargets(places_M, torch.arange(len(places_M)) % VOCABULARY)
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        found = dit(
            torch.randn(sum(LENGTHS), 16), is_target_T, torch.full((sum(LENGTHS),), 0.5), windows, targets=targets
        )
        loss = found.velocity_TZ.square().sum()
        (loss if found.token_loss is None else loss + found.token_loss).backward()
    products = {
        name: flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name)
    }
    no_encoder = TextVAEConfig(vocab_size=VOCABULARY, num_encoder_layers=0)
    by_formula = dit_flops(config, no_encoder, LENGTHS, LENGTHS, len(places_M))
    attention = 3 * 4.0 * config.num_layers * config.width * sum(length**2 for length in LENGTHS)
    return sum(products.values()), by_formula - attention


def shape(**options: object) -> TextDiTConfig:
    """Small, but wide and of a large enough vocabulary for what the formulas leave out to be little."""
    return TextDiTConfig(latent_dim=16, width=128, num_layers=2, head_dim=64, vocab_size=VOCABULARY, **options)


@pytest.mark.parametrize(
    "options", [{}, {"head": "categorical"}, {"head": "categorical", "token_embedding": True}], ids=str
)
def test_a_dits_formula_is_what_torch_counts(options: dict[str, object]) -> None:
    by_count, by_formula = counted(shape(**options))
    assert by_formula == pytest.approx(by_count, rel=0.03)


def test_a_token_embeddings_share_is_what_torch_counts() -> None:
    (plain, plain_formula), (more, more_formula) = (
        counted(shape(head="categorical", token_embedding=asked)) for asked in (False, True)
    )
    assert more_formula - plain_formula == pytest.approx(more - plain, rel=0.03)
