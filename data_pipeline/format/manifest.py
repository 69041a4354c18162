"""The manifests of prepared folders: what the shards hold, their hashes, and the fingerprint that a resumed run
compares.

A process reads a manifest once, unless its file changes, and not at all where another process has given it the text: a thousand ranks
share a disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from data_pipeline.core import storage
from data_pipeline.core.errors import UserError
from data_pipeline.core.outside import parse_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SETTLED_S = 1.0
"""A file that was written less long ago may change again without a sign: file systems' clocks tick slowly."""
SPLITS = ("train", "heldout")

MAX_SHARDS = 100_000  # of a split: five digits
_SHA256 = r"^[0-9a-f]{64}$"
_SHARD_NAME = r"^(train|heldout)-[0-9]{5}\.tar$"  # no separators: a manifest cannot point out of its folder
_Count = Annotated[int, Field(gt=0, lt=1 << 48)]  # sums of them fit 64 bits


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TokenizerInfo(_Strict):
    """Identity of a tokenizer. `sha256` is over its canonical tokenizer.json; `vocab_size` is the largest id + 1."""

    name: str
    revision: str | None
    sha256: str = Field(pattern=_SHA256)
    vocab_size: _Count
    special_ids: dict[str, int]
    eos_id: int | None


class ShardInfo(_Strict):
    """One token shard. `tokens` counts those in windows, without the rows' unfilled tails."""

    name: str = Field(pattern=_SHARD_NAME)
    rows: _Count
    windows: _Count
    tokens: _Count
    bytes: _Count
    sha256: str = Field(pattern=_SHA256)


class FeatureShardInfo(_Strict):
    """One feature shard, with the same rows as the token shard of the same name."""

    name: str = Field(pattern=_SHARD_NAME)
    rows: _Count
    bytes: _Count
    sha256: str = Field(pattern=_SHA256)


class MemberInfo(_Strict):
    """dtype (NumPy name) and shape of one array of a feature shard's row."""

    dtype: Literal["int8", "uint8", "int16", "uint16", "float16", "float32"]
    shape: list[_Count]


class Pairs(_Strict):
    """Every window is a context and a target, of these two fields of a record."""

    context_field: str
    target_field: str


class Manifest(_Strict):
    """A prepared folder. `source`, `text_field`, `source_files`, `statistics` and the names of tokenizer and fields inform; everything
    else enters the fingerprint. `source_files` is `sources.files_hash`; both are None in folders of earlier versions. `pairs` is
    written only of data whose windows have contexts and targets of their own, which then lie in the shards.
    """

    format_version: Literal[1]
    fingerprint: str = Field(pattern=_SHA256)
    row_tokens: _Count
    token_dtype: Literal["uint16", "uint32"]
    min_window: _Count
    max_window: _Count
    seed: int
    heldout_fraction: float = Field(ge=0, lt=1)
    dedupe: bool
    tokenizer: TokenizerInfo
    splits: dict[str, list[ShardInfo]]
    source: str
    text_field: str | None = None
    source_files: str | None = Field(default=None, pattern=_SHA256)
    pairs: Pairs | None = None
    statistics: dict[str, int]

    @classmethod
    def load(cls, folder: str | object, named_by: str = "--data") -> "Manifest":
        """Read and check `<folder>/manifest.json`; the folder may be a URL.

        Raises UserError on any deviation; of a folder that is not there it says that the option or key `named_by` names its place.
        """
        return load_checked(
            cls,
            folder,
            "copy it again from where it was prepared, or prepare the data again (textldm prepare ... --fresh)",
            f"if it was moved, say where it is now with {named_by}; if textldm prepare was interrupted, run it again to its end",
        )

    @classmethod
    def create(cls, **fields: Any) -> "Manifest":
        """A manifest of the fields with its fingerprint filled in."""
        return create_fingerprinted(cls, format_version=FORMAT_VERSION, **fields)

    @field_validator("splits")
    @classmethod
    def _check_names(cls, splits: dict[str, list[ShardInfo]]) -> dict[str, list[ShardInfo]]:
        return check_shard_names(splits)

    @model_validator(mode="after")
    def _check_counts(self) -> "Manifest":
        if self.max_window > self.row_tokens:
            raise ValueError(f"max_window {self.max_window} is larger than row_tokens {self.row_tokens}")
        for shard in (shard for shards in self.splits.values() for shard in shards):
            if not shard.rows <= shard.windows <= shard.tokens <= shard.rows * self.row_tokens:
                raise ValueError(f"the counts of {shard.name} contradict each other: {shard}")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_pairs(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Manifests of other data, and their fingerprints, are what they were before there were pairs."""
        fields: dict[str, Any] = written(self)
        if fields.get("pairs") is None:
            fields.pop("pairs", None)
        return fields

    def content(self) -> dict[str, Any]:
        """The fields that determine what training sees."""
        fields = self.model_dump(exclude={"fingerprint", "source", "text_field", "source_files", "pairs", "statistics"})
        if self.pairs:
            fields["pairs"] = True
        fields["tokenizer"] = {name: fields["tokenizer"][name] for name in ("sha256", "vocab_size", "eos_id")}
        return fields

    def fill(self, split: str = "train") -> float:
        """Share of the rows' places that windows fill."""
        places = self.row_tokens * sum(shard.rows for shard in self.splits[split])
        return sum(shard.tokens for shard in self.splits[split]) / places if places else 1.0


class FeatureManifest(_Strict):
    """A feature cache beside a prepared folder. `teacher` and `codec` describe what made it; `tokens_fingerprint` is
    the token shards'.
    """

    format_version: Literal[1]
    fingerprint: str = Field(pattern=_SHA256)
    tokens_fingerprint: str = Field(pattern=_SHA256)
    row_tokens: _Count
    members: dict[str, MemberInfo]
    teacher: dict[str, Any]
    codec: dict[str, Any]
    splits: dict[str, list[FeatureShardInfo]]
    statistics: dict[str, float] = {}

    @classmethod
    def load(cls, folder: str | object, named_by: str = "--features") -> "FeatureManifest":
        """Read and check `<folder>/manifest.json`. Raises UserError on any deviation, as `Manifest.load` does."""
        return load_checked(
            cls,
            folder,
            "copy it again, or cache the features again (textldm cache)",
            f"if it was moved, say where it is now with {named_by}; else run textldm cache, which makes it, or run it again to its end",
        )

    @classmethod
    def create(cls, **fields: Any) -> "FeatureManifest":
        """A manifest of the fields with its fingerprint filled in."""
        return create_fingerprinted(cls, format_version=FORMAT_VERSION, **fields)

    @field_validator("splits")
    @classmethod
    def _check_names(cls, splits: dict[str, list[FeatureShardInfo]]) -> dict[str, list[FeatureShardInfo]]:
        return check_shard_names(splits)

    @model_validator(mode="after")
    def _check_members(self) -> "FeatureManifest":
        if sorted(self.members) != ["features", "scales"]:
            raise ValueError(f"the members are {sorted(self.members)}, expected features and scales")
        for name, info in self.members.items():
            if len(info.shape) not in (1, 2) or info.shape[0] != self.row_tokens:
                raise ValueError(
                    f"{name} has the shape {info.shape}, expected [{self.row_tokens}] or [{self.row_tokens}, n]"
                )
        return self

    def content(self) -> dict[str, Any]:
        """The fields that determine what training sees."""
        return self.model_dump(exclude={"fingerprint", "statistics"})

    def check_matches(self, tokens: Manifest, folder: object) -> None:
        """Raise UserError unless this cache was made for exactly these token shards."""
        if self.tokens_fingerprint != tokens.fingerprint or self.row_tokens != tokens.row_tokens:
            raise UserError(
                f"{folder}/{MANIFEST_NAME}: these features belong to token shards with fingerprint {self.tokens_fingerprint[:16]}..., "
                f"but the data's is {tokens.fingerprint[:16]}...: cache the features of this data again"
            )
        for split, shards in self.splits.items():
            found = [(shard.name, shard.rows) for shard in shards]
            expected = [(shard.name, shard.rows) for shard in tokens.splits.get(split, [])]
            if found != expected:
                raise UserError(
                    f"{folder}/{MANIFEST_NAME}: the {split} feature shards {found[:3]}... differ from the token shards "
                    f"{expected[:3]}...: "
                    "finish the feature cache, or make it again"
                )


AnyManifest = TypeVar("AnyManifest", Manifest, FeatureManifest)


def check_shard_names(splits: Mapping[str, list[Any]]) -> Any:
    """Refuse shards that are missing, out of order, named twice, or of another split."""
    if sorted(splits) != sorted(SPLITS):
        raise ValueError(f"the splits are {sorted(splits)}, expected {sorted(SPLITS)}")
    for split, shards in splits.items():
        for index, shard in enumerate(shards):
            if shard.name != shard_name(split, index):
                raise ValueError(
                    f"shard {index} of {split} is called {shard.name}, expected {shard_name(split, index)}"
                )
    return splits


def shard_name(split: str, index: int) -> str:
    """File name of a shard."""
    return f"{split}-{index:05d}.tar"


def fingerprint(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content's canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def create_fingerprinted(kind: type[AnyManifest], **fields: Any) -> AnyManifest:
    draft = kind(fingerprint="0" * 64, **fields)
    return draft.model_copy(update={"fingerprint": fingerprint(draft.content())})


_texts: dict[str, bytes] = {}
"""What another process has read, by path."""
_known: dict[tuple[type[BaseModel], str], tuple[tuple[int, ...] | None, Any]] = {}
"""What this process has read, with its file's state then."""


def give(folder: str, text: bytes) -> None:
    """The manifest of this folder is what another process of this host has read."""
    _texts[f"{folder}/{MANIFEST_NAME}"] = text


def load_checked(kind: type[AnyManifest], folder: object, remedy: str, where: str) -> AnyManifest:
    """A manifest, every field and its fingerprint checked; `remedy` for one that is damaged, `where` if it is not there."""
    path = f"{folder}/{MANIFEST_NAME}"
    text, state = _texts.pop(path, None), _state(path)
    if text is None and (kind, path) in _known and _known[kind, path][0] == state:
        return _known[kind, path][1]
    manifest = _checked(kind, folder, path, text, remedy, where)
    if state is None or time.time() - state[0] / 1e9 > SETTLED_S:
        _known[kind, path] = state, manifest
    return manifest


def _state(path: str) -> tuple[int, ...] | None:
    """Of a local file, by which a change is seen; those behind URLs do not change while a process lives."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _checked(
    kind: type[AnyManifest], folder: object, path: str, text: bytes | None, remedy: str, where: str
) -> AnyManifest:
    try:
        text = storage.read_bytes(str(folder), MANIFEST_NAME) if text is None else text
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is no finished folder; {where}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    try:
        fields = parse_json(text, _no_duplicates)
        manifest = kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: {place or 'the whole file'}: {first['msg']} (found {first['input']!r:.80}); {remedy}"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # no JSON or UTF-8, a key twice, endless brackets
        raise UserError(f"{path} is not a manifest: {error}; {remedy}") from None
    expected = fingerprint(manifest.content())
    if manifest.fingerprint != expected:
        raise UserError(
            f"{path}: the fingerprint {manifest.fingerprint[:16]}... does not match the contents ({expected[:16]}...): "
            f"the file was changed after it was written; {remedy}"
        )
    return manifest


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"duplicate key among {sorted(name for name, _ in pairs)}")
    return fields
