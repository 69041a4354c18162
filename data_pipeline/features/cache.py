"""A finished feature cache: opening it, and reading it beside the tokens.

The folder holds `manifest.json`, `codec.safetensors`, and for every token shard one of the same name whose rows hold
`features` (uint8 [R, C], the codec's bytes; zeros behind the last window) and `scales` (uint8 [R]).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import is_url
from data_pipeline.features.codec import Codec, load_codec
from data_pipeline.features.settings import CODEC_NAME
from data_pipeline.format.manifest import MANIFEST_NAME, FeatureManifest, Manifest, MemberInfo
from data_pipeline.format.shards import Member
from data_pipeline.reading.batch import CodedFeatures
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import FeatureRows

JOB_NAME = "job.json"


@dataclass(frozen=True)
class FeatureCache:
    """A cache that belongs to the data, with the codec that reads it."""

    folder: str
    manifest: FeatureManifest
    codec: Codec

    def to(self, device: torch.device | str) -> "FeatureCache":
        return FeatureCache(self.folder, self.manifest, self.codec.to(device))

    def read(self, split: str, span: Span) -> CodedFeatures:
        """Coded features of the span's rows, flattened to T = rows * R tokens."""
        arrays = FeatureRows(self.folder, self.manifest, split, verify=False).read(span)
        features, scales = (torch.from_numpy(arrays[name].copy()) for name in ("features", "scales"))
        return CodedFeatures(features.flatten(0, 1), scales.flatten())


def load_cache(folder: str | Path, tokens: Manifest) -> FeatureCache:
    """Open the cache in `folder` for the data with the manifest `tokens`.

    Raises UserError when it is unfinished, was made for other token shards or another tokenizer, lacks a shard, or when
    its codec is not the one that wrote it. Hashes of the shards are checked by whoever reads them.
    """
    folder = str(folder)
    manifest = FeatureManifest.load(folder)
    manifest.check_matches(tokens, folder)
    check_tokenizer(manifest, tokens, folder)
    codec = load_codec(f"{folder}/{CODEC_NAME}")
    if (found := codec.fingerprint()) != manifest.codec.get("fingerprint"):
        raise UserError(
            f"{folder}/{CODEC_NAME} has fingerprint {found}, but the features were written with "
            f"{manifest.codec.get('fingerprint')}: copy the folder again, or cache the features again"
        )
    if manifest.members != member_infos(codec, manifest.row_tokens):
        raise UserError(
            f"{folder}/{MANIFEST_NAME}: arrays {manifest.members} are not what its codec writes; cache the features again"
        )
    if not is_url(folder):
        for shard in (shard for shards in manifest.splits.values() for shard in shards):
            path = Path(folder) / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                raise UserError(
                    f"{path}: {'missing' if size is None else f'{size} bytes'}, expected {shard.bytes} bytes: "
                    "copy it again, or delete it and cache the features again (finished shards are kept)"
                )
    return FeatureCache(folder, manifest, codec)


def check_tokenizer(manifest: FeatureManifest, tokens: Manifest, folder: str) -> None:
    """Refuse features of tokens that another tokenizer made."""
    if manifest.teacher.get("tokenizer_sha256") != tokens.tokenizer.sha256:
        raise UserError(
            f"{folder}/{MANIFEST_NAME}: made for tokenizer {manifest.teacher.get('tokenizer_sha256')}, the data's is "
            f"{tokens.tokenizer.sha256} ({tokens.tokenizer.name}): cache the features of this data again"
        )


def feature_members(codec: Codec, row_tokens: int) -> tuple[Member, ...]:
    """Arrays of a feature shard's row."""
    return tuple(Member(name, info.dtype, tuple(info.shape)) for name, info in member_infos(codec, row_tokens).items())


def member_infos(codec: Codec, row_tokens: int) -> dict[Literal["features", "scales"], MemberInfo]:
    """`feature_members` as entries of a manifest: dtype and shape by name."""
    return {
        "features": MemberInfo(dtype="uint8", shape=[row_tokens, codec.num_code_bytes]),
        "scales": MemberInfo(dtype="uint8", shape=[row_tokens]),
    }


def tile(windows: Sequence[np.ndarray], row_tokens: int) -> tuple[list[int], list[bool]]:
    """Lengths of consecutive windows that cover all rows, each row's unfilled tail being one too, and False for the tails."""
    lengths: list[int] = []
    wanted: list[bool] = []
    for row in windows:
        tail = row_tokens - int(row.sum())
        lengths += [*row.tolist(), *([tail] if tail else [])]
        wanted += [True] * len(row) + [False] * bool(tail)
    return lengths, wanted
