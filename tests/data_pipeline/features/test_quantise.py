"""Packing is lossless and compact; the quantisers are as good as theory says."""

import pytest
import torch

from data_pipeline.features.codec_choice import DISTORTION
from data_pipeline.features.quantise import (
    DIGITS_PER_BYTE,
    code_bytes,
    codebook,
    pack,
    scale_codes,
    scale_values,
    unpack,
)

LEVELS = [*DIGITS_PER_BYTE, 65536]


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("count", [1, 7, 16])
def test_packing_is_lossless_and_as_small_as_promised(levels, count):
    digits_TK = torch.randint(levels, (50, count), generator=torch.Generator().manual_seed(0))
    codes_TC = pack(digits_TK, levels)
    assert codes_TC.dtype == torch.uint8
    assert codes_TC.shape == (50, code_bytes(levels, count))
    assert torch.equal(unpack(codes_TC, levels, count), digits_TK)
    if levels <= 256:
        assert levels ** DIGITS_PER_BYTE[levels] <= 256


@pytest.mark.parametrize("levels", LEVELS)
def test_any_byte_decodes_to_a_level(levels):
    codes_TC = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4)
    digits_TK = unpack(codes_TC, levels, code_bytes(65536, 1) if levels == 65536 else DIGITS_PER_BYTE[levels])
    assert int(digits_TK.min()) >= 0
    assert int(digits_TK.max()) < levels


@pytest.mark.parametrize("levels", [2, 3, 4, 6, 16, 256])
def test_quantisers_reach_the_distortion_that_the_allocation_assumes(levels):
    values_N = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    book = codebook(levels, 64)
    quantised_N = book[torch.bucketize(values_N, (book[1:] + book[:-1]) / 2)]
    error = float((quantised_N - values_N).square().mean())
    assert error == pytest.approx(DISTORTION[levels], rel=0.15)


def test_scales_round_to_a_few_percent():
    scales_T = torch.logspace(-3, 1, 500)
    assert (scale_values(scale_codes(scales_T)) / scales_T - 1).abs().max() < 0.023
    assert scale_codes(torch.tensor([0.0, 1e9])).tolist() == [0, 255]
