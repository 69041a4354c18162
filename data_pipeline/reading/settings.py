"""The data's section of a configuration: which rows make up a step, how they are read, and how windows are cut."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from data_pipeline.core.errors import UserError
from data_pipeline.core.settings import STRICT, OnResume, Section, Share
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.streams import check_streams, largest_micro_batch, rank_rows


class Split(Section):
    """How windows are cut into segments; both parts of a cut window hold at least `min_tokens`, and nothing is thrown away.

    none: a window is one PREFIX segment.
    truncate (stage 1): with `truncate_probability` a window is cut at a uniform place into PREFIX and SUFFIX.
    context (stage 2): a window of at least 2 * min_tokens is cut into PREFIX (context) and SUFFIX (target), the context's share
    uniform in [context_min, context_max]; a shorter window is one SUFFIX segment, a target without context.
    data (stage 2): where the data itself says (textldm prepare --context-field --target-field), into context and target of any length.
    """

    model_config = STRICT | {"frozen": True}

    kind: Literal["none", "truncate", "context", "data"]
    """truncate: stage 1, a window becomes two segments, so that all lengths are reconstructed; context: stage 2; data: stage 2, where
    the data was prepared as pairs of context and target."""
    truncate_probability: Share = 0.5
    """Share of windows that are cut (kind truncate)."""
    context_min: Share = 0.1
    """Smallest share of a window that is context (kind context)."""
    context_max: Share = 0.9
    """Largest share of a window that is context (kind context)."""
    training_context_max: Share | None = None
    """Of training's windows, where it is another than context_max, by which held-out ones are always cut: shorter contexts leave more
    targets to learn from."""
    min_tokens: PositiveInt = 4
    """Shortest segment, in tokens."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "context" and not 0 < self.context_min <= self.context_max < 1:
            raise ValueError(
                f"context_min is {self.context_min} and context_max {self.context_max}; expected 0 < min <= max < 1"
            )
        largest = self.training_context_max
        if largest is not None and not (self.kind == "context" and self.context_min <= largest < 1):
            raise ValueError(
                f"training_context_max is {largest}, of a split of kind {self.kind} with context_min {self.context_min}; expected kind"
                " context, and context_min <= training_context_max < 1; or set it to null"
            )
        return self

    @property
    def in_training(self) -> Self:
        """How training's windows are cut."""
        return self.model_copy(
            update={"context_max": self.training_context_max or self.context_max, "training_context_max": None}
        )

    @property
    def has_targets(self) -> bool:
        """Whether windows are cut into contexts and targets, which stage 2 and the baselines learn from."""
        return self.kind in ("context", "data")

    def check_data(self, manifest: Manifest, path: str) -> None:
        """Refuse kind data of data that does not split its windows. Raises: UserError."""
        if self.kind == "data" and manifest.pairs is None:
            raise UserError(
                f"data.split.kind is data, but {path} holds windows of whole texts, which say nothing of contexts and targets: set "
                "data.split.kind=context, or prepare pairs (textldm prepare --context-field ... --target-field ...)"
            )


class Data(Section):
    """Prepared text and how a step's global batch is drawn from it."""

    path: Annotated[str, OnResume.FREE]  # the data's fingerprint is compared by itself
    """Folder that textldm prepare wrote (manifest.json, shards, tokenizer)."""
    fingerprint: Annotated[str | None, OnResume.FREE] = Field(default=None, pattern=r"^[0-9a-f]{8,64}$")
    """Beginning of the fingerprint (textldm prepare inspect) that the folder must have; none: any, and a resumed run its own."""
    streams: Annotated[PositiveInt, OnResume.NEVER]
    """Independent sequences of rows, each with shards of its own; it fixes the order of the data for good."""
    rows_per_step: Annotated[PositiveInt, OnResume.NEVER]
    """Rows of one optimizer step over all ranks; times the manifest's row_tokens = tokens a step. Any number of ranks shares them out;
    one that does not divide them computes filler rows besides."""
    micro_batch_rows: Annotated[PositiveInt, OnResume.FREE]
    """Most rows of one forward and backward pass on one rank; training takes the largest divisor of the rank's rows within
    it. Memory only: the gradients do not depend on it."""
    split: Split
    """How windows are cut into segments."""
    verify: Annotated[bool, OnResume.FREE] = True
    """Check each shard's SHA-256 when it is opened."""
    workers: Annotated[NonNegativeInt, OnResume.FREE] = 1
    """Threads that read rows and make batches of them, two steps ahead at least; 0: when they are asked for."""
    cache_dir: Annotated[str | None, OnResume.FREE] = None
    """Folder for copies of remote shards (a URL in data.path); none: textldm/shards in the user's cache folder."""
    cache_gigabytes: Annotated[PositiveFloat, OnResume.FREE] = 100.0
    """When the copies take more, those not used for longest are removed."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_streams(self.streams, self.rows_per_step)
        return self

    def manifest(self) -> Manifest:
        """Of the prepared text. Raises: UserError, also if it is not the one that `fingerprint` names."""
        manifest = Manifest.load(self.path, "--set data.path=")
        if not manifest.fingerprint.startswith(self.fingerprint or ""):
            raise UserError(
                f"{self.path} has fingerprint {manifest.fingerprint}, data.fingerprint says {self.fingerprint}: name the right folder, or"
                " drop the key"
            )
        self.split.check_data(manifest, self.path)
        return manifest

    def reading(self) -> dict[str, Any]:
        """How shards are opened: what loaders and `TokenRows` take beside the folder."""
        return self.model_dump(include={"verify", "cache_dir", "cache_gigabytes"})

    def rank_rows(self, world_size: int) -> int:
        """Rows of a step that each of so many ranks computes, filler included."""
        return rank_rows(self.rows_per_step, world_size)

    def micro_batch(self, world_size: int = 1, at_most: int | None = None) -> int:
        """Rows of a training micro-batch: the largest divisor of a rank's rows a step within micro_batch_rows and `at_most`."""
        return largest_micro_batch(
            self.rank_rows(world_size), min(self.micro_batch_rows, at_most or self.micro_batch_rows)
        )
