"""Fitting a feature codec to a sample, and choosing the smallest that keeps a mean cosine.

Everything is measured on a part of the sample that no fit has seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.features.codec import Codec, ExactCodec, FeatureCodec
from data_pipeline.features.ngram_means import NgramMeans
from data_pipeline.features.quantise import DIGITS_PER_BYTE, code_bytes

# Shares of the sample's windows: n-gram tables, principal components, measurement.
TABLE_SHARE, BASIS_SHARE = 0.7, 0.15
SMALLEST_SAMPLE = 1000
LEVELS_OF_BITS = {4: 16, 8: 256, 16: 65536}
# Mean squared error of each quantiser on a unit Gaussian (Lloyd-Max; one level is "not stored").
DISTORTION = {1: 1.0, 2: 0.3634, 3: 0.1902, 4: 0.1175, 6: 0.0580, 16: 0.00950, 256: 0.0003}
MEASURED_TOKENS = 32768


@dataclass(frozen=True)
class FeatureSample:
    """Features with the tokens and windows that they belong to."""

    features_TF: torch.Tensor
    tokens_T: torch.Tensor
    window_lengths: Sequence[int]
    vocab_size: int

    def windows(self, first: float, last: float) -> "FeatureSample":
        """The windows between two shares (0 to 1) of all windows."""
        begin, end = (round(share * len(self.window_lengths)) for share in (first, last))
        start = sum(self.window_lengths[:begin])
        lengths = self.window_lengths[begin:end]
        part = slice(start, start + sum(lengths))
        return FeatureSample(self.features_TF[part], self.tokens_T[part], lengths, self.vocab_size)

    def at_most(self, num_tokens: int) -> "FeatureSample":
        """The first windows, as many as hold no more than about `num_tokens`."""
        return self if len(self.tokens_T) <= num_tokens else self.windows(0, num_tokens / len(self.tokens_T))


@dataclass(frozen=True)
class Target:
    """What a codec must keep on windows that it was not fitted on."""

    mean_cosine: float = 0.99
    explained: float = 0.9
    """Share of the variance about the mean direction. A guard: where all features point nearly the same way, as those of a hardly
    trained teacher do, any cosine is reached by storing next to nothing."""

    def __post_init__(self) -> None:
        if not (0 < self.mean_cosine < 1 and 0 <= self.explained < 1):
            raise UserError(
                f"target cosine {self.mean_cosine} and variance {self.explained}: expected shares below 1; for all of it, --exact"
            )


@dataclass(frozen=True)
class Fidelity:
    """What a codec keeps and what it takes; measured on held-back windows."""

    rank: int
    bits: str
    """Bits of every component, "mixed", or "exact"."""
    ngram_order: int
    mean_cosine: float
    p1_cosine: float
    """First percentile over tokens."""
    explained: float
    """Share of the variance about the mean direction that is kept. Directions of a language model's states have much in
    common, so a cosine near 1 can hide that little of what differs is left."""
    standard_error: float
    """Standard error of the mean cosine over tokens."""
    bytes_per_token: float
    bf16_ratio: float
    """bytes_per_token over that of plain bfloat16."""
    codec_bytes: int
    """Size of the codec itself, paid once for the whole data set."""

    def reaches(self, target: Target) -> bool:
        """Whether it reaches both shares of the target, the cosine by two standard errors more."""
        return self.mean_cosine - 2 * self.standard_error >= target.mean_cosine and self.explained >= target.explained

    def total_bytes(self, num_tokens: int) -> float:
        """Size of the cache of a data set."""
        return self.bytes_per_token * num_tokens + self.codec_bytes

    @classmethod
    def header(cls) -> str:
        wide = "".join(f" {name:>8}" for name in ("cosine", "1st pct", "variance", "B/token", "of bf16"))
        return f"{'rank':>5} {'bits':>6} {'n-grams':>7}{wide}"

    def __str__(self) -> str:
        return (
            f"{self.rank:>5} {self.bits:>6} {self.ngram_order:>7} {self.mean_cosine:>8.5f} {self.p1_cosine:>8.5f} "
            f"{self.explained:>8.4f} {self.bytes_per_token:>8.1f} {self.bf16_ratio:>8.4f}"
        )


@dataclass(frozen=True)
class FittedBasis:
    """Mean, n-gram tables and all principal components of what they leave; a codec keeps some of the components."""

    mean_F: torch.Tensor
    basis_FF: torch.Tensor
    spread_F: torch.Tensor
    ngrams: NgramMeans

    def codec(self, levels: Sequence[int]) -> FeatureCodec:
        """The codec with these levels for the leading components."""
        rank = len(levels)
        return FeatureCodec(self.mean_F, self.basis_FF[:rank], self.spread_F[:rank], tuple(levels), self.ngrams)

    def uniform(self, rank: int, bits: int) -> FeatureCodec:
        """The codec with `bits` (4, 8 or 16) for each of the `rank` leading components."""
        if bits not in LEVELS_OF_BITS or not 1 <= rank <= len(self.mean_F):
            raise UserError(
                f"rank {rank} with {bits} bits: expected a rank of 1 to {len(self.mean_F)} and bits of 4, 8 or 16 "
                "(or the exact codec)"
            )
        return self.codec([LEVELS_OF_BITS[bits]] * rank)

    def mixed(self, num_bytes: int) -> FeatureCodec:
        """The codec with the best allocation of `num_bytes` bytes of digits per token."""
        return self.codec(allocate(self.spread_F.square(), num_bytes))


def fit_basis(sample: FeatureSample, ngram_order: int) -> FittedBasis:
    """Fit on the sample's first 85 %: tables on 70 %, components on what these leave of windows they have not seen."""
    if len(sample.tokens_T) < SMALLEST_SAMPLE or len(sample.window_lengths) < 20:
        raise UserError(
            f"a sample of {len(sample.tokens_T)} tokens in {len(sample.window_lengths)} windows is too small to fit a "
            f"codec; expected at least {SMALLEST_SAMPLE} tokens in 20 windows: take a larger --sample-tokens or --exact"
        )
    seen, fresh = sample.windows(0, TABLE_SHARE), sample.windows(TABLE_SHARE, TABLE_SHARE + BASIS_SHARE)
    mean_F = directions(seen.features_TF).mean(dim=0)
    centred_TF = directions(seen.features_TF) - mean_F
    ngrams = NgramMeans.fit(centred_TF, seen.tokens_T, seen.window_lengths, ngram_order, sample.vocab_size)
    # Without tables nothing was fitted that could flatter the part it was fitted on: use all of it.
    rest = fresh if ngram_order else sample.windows(0, TABLE_SHARE + BASIS_SHARE)
    residuals_TF = directions(rest.features_TF) - mean_F - ngrams.predict(rest.tokens_T, rest.window_lengths)
    variances_F, vectors_FF = torch.linalg.eigh(residuals_TF.T.double() @ residuals_TF.double() / len(residuals_TF))
    spread_F = variances_F.flip(0).clamp_min(1e-12).sqrt().float()
    return FittedBasis(mean_F, vectors_FF.flip(1).T.float().contiguous(), spread_F, ngrams)


def allocate(variance_F: torch.Tensor, num_bytes: int) -> list[int]:
    """Levels of each leading component so that `num_bytes` bytes leave the least squared error.

    Greedy by error removed per bit, which is optimal as the quantisers' rate-distortion points are convex. Then each
    group takes over components of the next one until its last byte is full.
    """
    ladder = sorted(DISTORTION)
    bits = [0.0] + [8 / DIGITS_PER_BYTE[levels] for levels in ladder[1:]]
    steps = [
        ((DISTORTION[lower] - DISTORTION[upper]) / (b - a), b - a)
        for lower, upper, a, b in zip(ladder, ladder[1:], bits, bits[1:])
    ]
    gain_FS = variance_F.double().cpu()[:, None] * torch.tensor([gain for gain, _ in steps], dtype=torch.float64)
    cost_FS = torch.tensor([cost for _, cost in steps], dtype=torch.float64).expand_as(gain_FS)
    order = gain_FS.flatten().argsort(descending=True, stable=True)
    affordable = int((cost_FS.flatten()[order].cumsum(0) <= 8 * num_bytes + 1e-6).sum())
    taken = torch.zeros(gain_FS.numel(), dtype=torch.bool)
    taken[order[:affordable]] = True
    counts = taken.view_as(gain_FS).sum(dim=0).tolist()  # components with at least this many levels
    return _fill_bytes(dict(zip(ladder[1:], counts, strict=True)), num_bytes, len(variance_F))


def _fill_bytes(at_least: dict[int, int], num_bytes: int, num_components: int) -> list[int]:
    """Levels of each component, falling: each group of equal levels fills whole bytes, `num_bytes` in all at most.

    at_least: number of levels -> how many components shall have at least so many.
    """
    allocated: list[int] = []
    left = num_bytes
    for levels in sorted(at_least, reverse=True):
        wanted = max(0, at_least[levels] - len(allocated))
        count = min(-(-wanted // DIGITS_PER_BYTE[levels]) * DIGITS_PER_BYTE[levels], num_components - len(allocated))
        count = min(count, left * DIGITS_PER_BYTE[levels])
        allocated += [levels] * count
        left -= code_bytes(levels, count)
    return allocated


def measure(codec: Codec, sample: FeatureSample, bits: str = "mixed") -> Fidelity:
    """Encode and decode a sample, and compare."""
    coded = codec.encode(sample.features_TF, sample.tokens_T, sample.window_lengths)
    decoded_TF = codec.decode(coded, sample.tokens_T, sample.window_lengths)
    return _fidelity(codec, bits, sample.features_TF.float(), decoded_TF)


def _fidelity(codec: Codec, bits: str, features_TF: torch.Tensor, decoded_TF: torch.Tensor) -> Fidelity:
    cosine_T = torch.nn.functional.cosine_similarity(features_TF.double(), decoded_TF.double())
    wanted_TF = directions(features_TF)
    left = (directions(decoded_TF) - wanted_TF).square().sum()
    about_mean = (wanted_TF - wanted_TF.mean(dim=0)).square().sum()
    return Fidelity(
        rank=codec.rank,
        bits=bits,
        ngram_order=codec.ngram_order,
        mean_cosine=float(cosine_T.mean()),
        p1_cosine=float(cosine_T.kthvalue(max(1, len(cosine_T) // 100)).values),
        explained=float(1 - left / about_mean),
        standard_error=float(cosine_T.std() / len(cosine_T) ** 0.5),
        bytes_per_token=codec.bytes_per_token,
        bf16_ratio=codec.bytes_per_token / (2 * codec.feature_dim),
        codec_bytes=codec.own_bytes,
    )


def fidelity_table(basis: FittedBasis, held: FeatureSample) -> list[Fidelity]:
    """Rank x bits: every power of two below F and F itself, with 4, 8 and 16 bits."""
    width = len(basis.mean_F)
    ranks = [*(2**power for power in range(3, 20) if 2**power < width), width]
    return [measure(basis.uniform(rank, bits), held, str(bits)) for bits in LEVELS_OF_BITS for rank in ranks]


def smallest_mixed(basis: FittedBasis, held: FeatureSample, target: Target) -> tuple[FeatureCodec, Fidelity] | None:
    """The smallest mixed codec that reaches the target, by bisection; None if 2 bytes a feature do not."""
    low, high = 1, 1
    while not (reached := measure(basis.mixed(high), held)).reaches(target):
        low, high = high + 1, 2 * high
        if high > 2 * len(basis.mean_F):
            return None
    while low < high:
        middle = (low + high) // 2
        tried = measure(basis.mixed(middle), held)
        if tried.reaches(target):
            high, reached = middle, tried
        else:
            low = middle + 1
    return basis.mixed(high), reached


def choose(
    sample: FeatureSample,
    target: Target = Target(),
    ngram_orders: Sequence[int] = (0, 1, 2, 3),
    num_tokens: int = 10**9,
) -> tuple[FeatureCodec, Fidelity, list[Fidelity]]:
    """The codec that stores `num_tokens` in the fewest bytes, its own included, and reaches the target.

    Returns it, its fidelity, and the full table: rank x bits without n-gram tables, the best mixed codec of each order.
    Raises UserError when nothing reaches the target.
    """
    held = sample.windows(TABLE_SHARE + BASIS_SHARE, 1).at_most(MEASURED_TOKENS)
    table: list[Fidelity] = []
    candidates: list[tuple[FeatureCodec, Fidelity]] = []
    for order in ngram_orders:
        basis = fit_basis(sample, order)
        if order == min(ngram_orders):
            uniform = fidelity_table(basis, held)
            table += uniform
            candidates += [(basis.uniform(f.rank, int(f.bits)), f) for f in uniform if f.reaches(target)]
        if (mixed := smallest_mixed(basis, held, target)) is not None:
            candidates.append(mixed)
            table.append(mixed[1])
    if not candidates:
        best = max(table, key=lambda fidelity: fidelity.mean_cosine)
        raise UserError(
            f"no codec reaches a mean cosine of {target.mean_cosine}; the best is {best.mean_cosine:.6f}: lower "
            "--target-cosine or use --exact"
        )
    codec, fidelity = min(candidates, key=lambda candidate: candidate[1].total_bytes(num_tokens))
    return codec, fidelity, table


def fit(
    sample: FeatureSample, rank: int | None = None, bits: int = 8, ngram_order: int = 0
) -> tuple[FeatureCodec, Fidelity]:
    """The plain codec: `rank` components (None: all) of `bits` bits each."""
    basis = fit_basis(sample, ngram_order)
    codec = basis.uniform(rank or len(basis.mean_F), bits)
    held = sample.windows(TABLE_SHARE + BASIS_SHARE, 1).at_most(MEASURED_TOKENS)
    return codec, measure(codec, held, str(bits))


def exact(sample: FeatureSample, dtype: torch.dtype) -> tuple[ExactCodec, Fidelity]:
    """The codec that stores hidden states unchanged in `dtype`, the teacher's number format, and its fidelity."""
    codec = ExactCodec(sample.features_TF.shape[1], dtype)
    return codec, measure(codec, sample.at_most(MEASURED_TOKENS), "exact")


def directions(features_TF: torch.Tensor) -> torch.Tensor:
    """Features over their norms, float32."""
    return torch.nn.functional.normalize(features_TF.float(), dim=1)
