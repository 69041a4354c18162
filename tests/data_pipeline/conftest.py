"""Small prepared folders made of random tokens."""

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.format.manifest import FeatureManifest, Manifest, MemberInfo, ShardInfo, TokenizerInfo, shard_name
from data_pipeline.format.shards import Member, token_members, write_shard

VOCAB_SIZE, ROW_TOKENS, CODES = 512, 64, 5


def random_row(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and window lengths of a row with a short unfilled tail."""
    lengths = rng.multinomial(ROW_TOKENS - 12 - int(rng.integers(5)), [1 / 3] * 3).astype(np.int32) + 4
    tokens = rng.integers(1, VOCAB_SIZE, ROW_TOKENS).astype(np.uint16)
    tokens[lengths.sum() :] = 0
    return tokens, lengths


def write_prepared(folder: Path, shard_rows: list[int], heldout_rows: list[int], seed: int = 0) -> Manifest:
    """A prepared folder of random tokens."""
    rng = np.random.default_rng(seed)
    splits: dict[str, list[ShardInfo]] = {}
    for split, counts in (("train", shard_rows), ("heldout", heldout_rows)):
        splits[split] = []
        for index, count in enumerate(counts):
            rows = [random_row(rng) for _ in range(count)]
            written = write_shard(folder / shard_name(split, index), token_members(ROW_TOKENS, "uint16"), rows)
            windows, tokens = sum(len(lengths) for _, lengths in rows), sum(int(lengths.sum()) for _, lengths in rows)
            info = ShardInfo(name=shard_name(split, index), windows=windows, tokens=tokens, **written._asdict())
            splits[split].append(info)
    manifest = Manifest.create(
        row_tokens=ROW_TOKENS,
        token_dtype="uint16",
        min_window=4,
        max_window=64,
        seed=seed,
        heldout_fraction=0.1,
        dedupe=False,
        tokenizer=TokenizerInfo(
            name="random", revision=None, sha256="0" * 64, vocab_size=VOCAB_SIZE, special_ids={}, eos_id=None
        ),
        splits=splits,
        source="random",
        statistics={},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=2))
    return manifest


def write_features(folder: Path, manifest: Manifest) -> FeatureManifest:
    """A feature cache in which every code tells its split, shard, row and token."""
    members = [Member("features", "int16", (ROW_TOKENS, CODES)), Member("scales", "float16", (ROW_TOKENS,))]
    splits: dict[str, list[dict]] = {}
    for split, shards in manifest.splits.items():
        splits[split] = []
        for index, info in enumerate(shards):
            place = np.arange(ROW_TOKENS)[:, None] + 1000 * np.arange(CODES)
            rows = [
                ((place + 64 * row + 7 * index).astype(np.int16), np.full(ROW_TOKENS, row, np.float16))
                for row in range(info.rows)
            ]
            written = write_shard(folder / info.name, members, rows)
            splits[split].append({"name": info.name, **written._asdict()})
    features = FeatureManifest.create(
        tokens_fingerprint=manifest.fingerprint,
        row_tokens=ROW_TOKENS,
        members={member.name: MemberInfo(dtype=member.dtype, shape=list(member.shape)) for member in members},
        teacher={"name": "none"},
        codec={"rank": CODES},
        splits=splits,
    )
    (folder / "manifest.json").write_text(features.model_dump_json(indent=2))
    return features


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 25 uneven train shards, 2 held-out shards and a feature cache in `features`."""
    folder = tmp_path_factory.mktemp("prepared")
    manifest = write_prepared(folder, [3 + i % 4 for i in range(25)], [5, 6])
    write_features(folder / "features", manifest)
    return folder
