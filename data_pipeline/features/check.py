"""Does a feature cache hold what the teacher says? Cached against freshly computed features, on random rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import generator
from data_pipeline.features.cache import FeatureCache, load_cache, tile
from data_pipeline.features.teacher import Teacher
from data_pipeline.features.teacher_fit import check_fit
from data_pipeline.features.teacher_loading import load_teacher
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows

# The codec was measured on other text than a row's.
TOLERATED_LOSS = 0.01
# In bfloat16, another machine's features are not the same to the last bit, which moves some digits by one level.
TOLERATED_SHORTFALL = 0.003


@dataclass(frozen=True)
class RowAgreement:
    """One row's mean cosine between freshly computed features and the cached ones (`mean_cosine`), and between the fresh ones
    and themselves after encoding and decoding (`attainable`, the best that the codec can do).

    Their difference tells a row that holds other features. The cosine alone hardly does: n-gram means and the mean direction make
    up most of a decoded feature, whatever is stored.
    """

    shard: str
    row: int
    mean_cosine: float
    attainable: float

    @property
    def shortfall(self) -> float:
        """Attainable minus mean cosine; near 0 for a right row."""
        return self.attainable - self.mean_cosine

    def __str__(self) -> str:
        return f"row {self.row} of {self.shard}: mean cosine {self.mean_cosine:.4f} of {self.attainable:.4f} attainable"


@dataclass(frozen=True)
class Agreement:
    """Cosine between cached and fresh features over the tokens of some rows."""

    num_tokens: int
    mean_cosine: float
    p1_cosine: float
    rows: list[RowAgreement]

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def worst(self) -> RowAgreement:
        """The row with the largest shortfall."""
        return max(self.rows, key=lambda row: row.shortfall)

    def __str__(self) -> str:
        return (
            f"cached against fresh features: cosine mean {self.mean_cosine:.6f}, 1st percentile {self.p1_cosine:.6f} "
            f"({self.num_tokens:,} tokens of {self.num_rows} rows); furthest behind its codec: {self.worst}"
        )


def compare(
    data: str, tokens: Manifest, cache: FeatureCache, teacher: Teacher, num_rows: int, seed: int = 0
) -> Agreement:
    """Decode the cached features of random rows of both splits and run the teacher over the same rows."""
    if num_rows < 1:
        raise UserError(f"--rows {num_rows}: expected at least 1 row to compare")
    places = [
        (split, Span(0, index, row, row + 1))
        for split, shards in tokens.splits.items()
        for index, shard in enumerate(shards)
        for row in range(shard.rows)
    ]
    chosen = generator("feature check", seed).choice(len(places), size=min(num_rows, len(places)), replace=False)
    cache = cache.to(teacher.device)
    cosines, rows = [], []
    for split, span in (places[index] for index in sorted(chosen.tolist())):
        tokens_1R, windows = TokenRows(data, tokens, split, verify=False).read(span)
        lengths, wanted = tile(windows, tokens.row_tokens)
        tokens_T = torch.from_numpy(tokens_1R[0].astype(np.int64)).to(teacher.device)
        fresh_TF = teacher.features(tokens_T, lengths, wanted)
        used = int(windows[0].sum())
        both = [cache.read(split, span), cache.codec.encode(fresh_TF, tokens_T, lengths)]
        decoded = [cache.codec.decode(coded, tokens_T, lengths)[:used] for coded in both]
        cached_T, attainable_T = (cosine_similarity(fresh_TF[:used], y_TF).double().cpu() for y_TF in decoded)
        cosines.append(cached_T)
        name = tokens.splits[split][span.shard].name
        rows.append(RowAgreement(name, span.start, float(cached_T.mean()), float(attainable_T.mean())))
    cosine_T = torch.cat(cosines)
    first_percentile = cosine_T.kthvalue(max(1, len(cosine_T) // 100)).values
    return Agreement(len(cosine_T), float(cosine_T.mean()), float(first_percentile), rows)


def check_cache(
    data: str,
    features: str | Path,
    teacher: str | None,
    device: torch.device,
    num_rows: int = 32,
    token_budget: int = 16384,
    seed: int = 0,
) -> Agreement:
    """Compare a cache with its teacher, all of which runs here, whatever was left out there.

    Raises UserError when a row does not hold its features, or when the cosine falls below what the cache's manifest promises.
    """
    tokens = Manifest.load(data)
    cache = load_cache(features, tokens)
    made_by, promised = cache.manifest.teacher, cache.manifest.statistics["mean_cosine"]
    if teacher is None:
        raise UserError(
            f"{features} says that its teacher was {made_by['name']}, but what a cache says is not loaded: name the model with"
            " --teacher, or the configuration with its repa.teacher with --config"
        )
    name = teacher
    loaded = load_teacher(name, made_by["layer"], made_by["revision"], made_by["dtype"], token_budget, whole=True)
    loaded.to(device)
    check_fit(loaded, data, tokens)
    agreement = compare(data, tokens, cache, loaded, num_rows, seed)
    if agreement.worst.shortfall > TOLERATED_SHORTFALL:
        weights = loaded.fingerprint()
        same = "the same" if weights == made_by["weights"] else f"other ({weights}, not {made_by['weights']})"
        wrong = sum(row.shortfall > TOLERATED_SHORTFALL for row in agreement.rows)
        raise UserError(
            f"{features} does not hold the features of {loaded.name} in {wrong} of {agreement.num_rows} rows: "
            f"{agreement.worst}; the teacher's weights are {same}: cache the features again"
        )
    if agreement.mean_cosine < promised - TOLERATED_LOSS:
        raise UserError(
            f"{features} holds the features of {loaded.name}, but with a mean cosine of {agreement.mean_cosine:.4f}, promised "
            f"{promised:.4f}: its codec was fitted on too little or other text; cache them again with more --sample-tokens"
        )
    return agreement
