"""The feature codec: packing is lossless, decoding is what the format says, the fidelity is what theory allows."""

import pytest
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.features.codec import ExactCodec, FeatureCodec, load_codec
from data_pipeline.features.codec_choice import FeatureSample, fit_basis, measure
from data_pipeline.features.quantise import code_bytes, codebook, scale_values, unpack
from data_pipeline.reading.batch import CodedFeatures


def random_sample(num_tokens: int = 8000, width: int = 24, vocab_size: int = 20, seed: int = 0) -> FeatureSample:
    """Features that are part token, part noise of falling variance, about a large common mean."""
    generator = torch.Generator().manual_seed(seed)
    table_VF = torch.randn(vocab_size, width, generator=torch.Generator().manual_seed(99))
    tokens_T = torch.randint(vocab_size, (num_tokens,), generator=generator)
    noise_TF = torch.randn(num_tokens, width, generator=generator) * torch.logspace(0.5, -1, width)
    return FeatureSample(3 + table_VF[tokens_T] + noise_TF, tokens_T, [40] * (num_tokens // 40), vocab_size)


def test_decoding_is_mean_plus_tables_plus_one_product():
    sample = random_sample()
    codec = fit_basis(sample, ngram_order=1).codec([256, 256, 16, 16, 16, 6, 4, 3, 2, 2])
    coded = codec.encode(sample.features_TF, sample.tokens_T, sample.window_lengths)
    assert coded.codes_TC.shape == (8000, codec.num_code_bytes)
    decoded_TF = codec.decode(coded, sample.tokens_T, sample.window_lengths)
    token = 123
    digits, first = [], 0
    for levels, count in codec.groups:
        last = first + code_bytes(levels, count)
        digits += codebook(levels, 10)[unpack(coded.codes_TC[token : token + 1, first:last], levels, count)[0]].tolist()
        first = last
    expected_F = codec.mean_F + codec.ngrams.predict(sample.tokens_T, sample.window_lengths)[token]
    for digit, spread, row_F in zip(digits, codec.spread_K, codec.basis_KF, strict=True):
        expected_F = expected_F + digit * scale_values(coded.scales_T[token]) * spread * row_F
    torch.testing.assert_close(decoded_TF[token], expected_F)


def test_full_rank_at_16_bits_reproduces_directions_and_fewer_bits_do_worse():
    sample = random_sample()
    basis = fit_basis(sample, ngram_order=0)
    held = sample.windows(0.85, 1)
    losses = [1 - measure(basis.uniform(24, bits), held).mean_cosine for bits in (16, 8, 4)]
    assert losses[0] < 1e-8
    assert losses[0] < losses[1] < losses[2] < 0.005
    cut = [1 - measure(basis.uniform(rank, 16), held).mean_cosine for rank in (24, 12, 4)]
    assert cut == sorted(cut)


def test_outliers_of_any_size_are_kept():
    """Language models' states have a few huge dimensions, and first tokens of another size altogether."""
    sample = random_sample()
    sample.features_TF[:, 3] += 300
    sample.features_TF[::40] *= 1000
    basis = fit_basis(sample, ngram_order=0)
    assert 1 - measure(basis.uniform(24, 16), sample).mean_cosine < 1e-7


def test_tables_use_the_tokens():
    sample = random_sample()
    held = sample.windows(0.85, 1)
    levels = [16] * 6
    plain, tabled = (measure(fit_basis(sample, order).codec(levels), held).explained for order in (0, 1))
    assert tabled > plain + 0.05


def test_decoding_a_part_equals_the_part_of_decoding():
    """A truncated window keeps its features; rows are decoded in any company."""
    sample = random_sample()
    codec = fit_basis(sample, ngram_order=2).codec([16] * 8)
    coded = codec.encode(sample.features_TF, sample.tokens_T, sample.window_lengths)
    whole_TF = codec.decode(coded, sample.tokens_T, sample.window_lengths)
    part = slice(80, 110)  # a window's first 30 of 40 tokens
    part_coded = CodedFeatures(coded.codes_TC[part], coded.scales_T[part])
    torch.testing.assert_close(codec.decode(part_coded, sample.tokens_T[part], [30]), whole_TF[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_codec_is_bit_exact(dtype, tmp_path):
    features_TF = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).to(dtype).float() * 1e4
    features_TF = features_TF.to(dtype).float()
    codec = ExactCodec(12, dtype)
    codec.save(tmp_path / "codec.safetensors")
    codec = load_codec(tmp_path / "codec.safetensors")
    coded = codec.encode(features_TF, torch.zeros(30), [30])
    # A view at an odd offset, as bytes of a tar may be.
    shifted_TC = torch.cat([torch.zeros(1, dtype=torch.uint8), coded.codes_TC.flatten()])[1:].view_as(coded.codes_TC)
    assert torch.equal(codec.decode(CodedFeatures(shifted_TC, coded.scales_T), torch.zeros(30), [30]), features_TF)


def test_saving_keeps_everything(tmp_path):
    sample = random_sample()
    codec = fit_basis(sample, ngram_order=2).codec([256, 16, 16, 3])
    codec.save(tmp_path / "codec.safetensors")
    loaded = load_codec(tmp_path / "codec.safetensors")
    assert isinstance(loaded, FeatureCodec)
    assert loaded.fingerprint() == codec.fingerprint()
    assert loaded.describe() == codec.describe()
    coded = codec.encode(sample.features_TF, sample.tokens_T, sample.window_lengths)
    assert torch.equal(
        loaded.decode(coded, sample.tokens_T, sample.window_lengths),
        codec.decode(coded, sample.tokens_T, sample.window_lengths),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["codec.safetensors"]
    loaded.spread_K[0] *= 1.001
    assert loaded.fingerprint() != codec.fingerprint()


def test_broken_files_and_foreign_codes_are_refused(tmp_path):
    sample = random_sample()
    codec = fit_basis(sample, ngram_order=0).codec([16, 16])
    path = tmp_path / "codec.safetensors"
    with pytest.raises(UserError, match="not a readable feature codec"):
        load_codec(path)
    codec.save(path)
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:50], b"", b"\xff" * 8 + whole[8:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="feature codec"):
            load_codec(path)
    for codes_TC in (torch.zeros(5, 2, dtype=torch.uint8), torch.zeros(5, 1, dtype=torch.int16)):
        with pytest.raises(UserError, match="another codec"):
            codec.decode(CodedFeatures(codes_TC, torch.zeros(5, dtype=torch.uint8)), torch.zeros(5), [5])
    with pytest.raises(UserError, match="for a codec of 24 features"):
        codec.encode(torch.zeros(5, 23), torch.zeros(5), [5])
    with pytest.raises(UserError, match="not all finite"):
        codec.encode(torch.full((5, 24), torch.inf), torch.zeros(5), [5])
