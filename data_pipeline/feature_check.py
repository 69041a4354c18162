"""Does a feature cache hold what the teacher says? Cached against freshly computed features, on random rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.errors import UserError
from data_pipeline.feature_cache import FeatureCache, load_cache, tile
from data_pipeline.keys import generator
from data_pipeline.manifest import Manifest
from data_pipeline.order import Span
from data_pipeline.stream import TokenRows
from data_pipeline.teacher import Teacher, check_fit, load_teacher

# The codec was measured on other text, and bfloat16 on another machine is not the same to the last bit.
TOLERATED_LOSS = 0.01


@dataclass(frozen=True)
class Agreement:
    """Cosine between cached and fresh features over the tokens of some rows."""

    num_rows: int
    num_tokens: int
    mean_cosine: float
    p1_cosine: float

    def __str__(self) -> str:
        return (
            f"cached against fresh features: cosine mean {self.mean_cosine:.6f}, 1st percentile {self.p1_cosine:.6f} "
            f"({self.num_tokens:,} tokens of {self.num_rows} rows)"
        )


def compare(
    data: str, tokens: Manifest, cache: FeatureCache, teacher: Teacher, num_rows: int, seed: int = 0
) -> Agreement:
    """Decode the cached features of random rows of both splits and run the teacher over the same rows."""
    places = [
        (split, Span(0, index, row, row + 1))
        for split, shards in tokens.splits.items()
        for index, shard in enumerate(shards)
        for row in range(shard.rows)
    ]
    chosen = generator("feature check", seed).choice(len(places), size=min(num_rows, len(places)), replace=False)
    cache = cache.to(teacher.device)
    cosines = []
    for split, span in (places[index] for index in chosen.tolist()):
        tokens_1R, windows = TokenRows(data, tokens, split, verify=False).read(span)
        lengths, wanted = tile(windows, tokens.row_tokens)
        tokens_T = torch.from_numpy(tokens_1R[0].astype(np.int64)).to(teacher.device)
        fresh_TF = teacher.features(tokens_T, lengths, wanted)
        cached_TF = cache.codec.decode(cache.read(split, span), tokens_T, lengths)
        used = int(windows[0].sum())
        cosines.append(torch.nn.functional.cosine_similarity(fresh_TF[:used], cached_TF[:used]).cpu())
    cosine_T = torch.cat(cosines)
    first_percentile = cosine_T.kthvalue(max(1, len(cosine_T) // 100)).values
    return Agreement(len(chosen), len(cosine_T), float(cosine_T.double().mean()), float(first_percentile))


def check_cache(
    data: str,
    features: str | Path,
    teacher: str | None,
    device: torch.device,
    num_rows: int = 32,
    token_budget: int = 16384,
) -> Agreement:
    """Compare a cache with its teacher (by default the one it names).

    Raises UserError when the cosine falls below what the cache's manifest promises.
    """
    tokens = Manifest.load(data)
    cache = load_cache(features, tokens)
    made_by, promised = cache.manifest.teacher, cache.manifest.statistics["mean_cosine"]
    loaded = load_teacher(
        teacher or made_by["name"], made_by["layer"], made_by["revision"], made_by["dtype"], token_budget
    ).to(device)
    check_fit(loaded, data, tokens)
    agreement = compare(data, tokens, cache, loaded, num_rows)
    if agreement.mean_cosine < promised - TOLERATED_LOSS:
        weights = loaded.fingerprint()
        same = "the same" if weights == made_by["weights"] else f"other ({weights}, not {made_by['weights']})"
        raise UserError(
            f"{features} does not hold the features of {loaded.name}: mean cosine {agreement.mean_cosine:.4f}, "
            f"promised {promised:.4f}; the teacher's weights are {same}: cache the features again"
        )
    return agreement
