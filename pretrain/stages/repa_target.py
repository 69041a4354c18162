"""What REPA aligns the encoder with: a frozen teacher's features, out of a cache or of the teacher itself.

Shape letters: T packed tokens, F teacher features.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.features.cache import load_cache
from data_pipeline.features.codec import ExactCodec, FeatureCodec
from data_pipeline.features.teacher import Teacher
from data_pipeline.features.teacher_fit import check_fit, check_same_tokenizer
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import FILLER, Batch

if TYPE_CHECKING:
    from pretrain.stages.vae_config import VAERun


class RepaTarget(Protocol):
    """A teacher's features as a stage sees them."""

    @property
    def feature_dim(self) -> int:
        """F."""
        ...

    def directions(self, batch: Batch) -> Tensor:
        """The features over their norms [T, F]; those of a lossy codec as it gives them, see RepaHead."""
        ...


@dataclass(frozen=True)
class CachedFeatures:
    """Features that came with the batch, encoded by a codec."""

    codec: FeatureCodec | ExactCodec

    @property
    def feature_dim(self) -> int:
        return self.codec.feature_dim

    def directions(self, batch: Batch) -> Tensor:
        assert batch.features is not None  # the loader reads the cache that the codec is of
        decoded_TF = self.codec.decode(batch.features, batch.tokens_T, batch.window_lengths)
        return decoded_TF if isinstance(self.codec, FeatureCodec) else F.normalize(decoded_TF, dim=-1)


@dataclass(frozen=True)
class OnlineFeatures:
    """Features that the teacher computes in the loop."""

    teacher: Teacher

    @property
    def feature_dim(self) -> int:
        return self.teacher.feature_dim

    def directions(self, batch: Batch) -> Tensor:
        filler = {w for w, role in zip(batch.segment_windows, batch.segment_roles) if role == FILLER}
        wanted = [w not in filler for w in range(len(batch.window_lengths))]
        features_TF = self.teacher.features(batch.tokens_T, batch.window_lengths, wanted).clone()
        return F.normalize(features_TF.float(), dim=-1)


def repa_target(config: "VAERun", manifest: Manifest, device: torch.device) -> RepaTarget | None:
    """The one that a configuration names, on `device`; None without REPA. Raises: UserError."""
    repa = config.repa
    if features := config.features_folder():
        return CachedFeatures(load_cache(features, manifest).codec.to(device))
    if repa.weight and repa.online_teacher:
        from data_pipeline.features.teacher_loading import load_teacher  # with transformers, which takes a second

        check_same_tokenizer(repa.online_teacher, repa.revision, config.data.path, manifest)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        teacher = load_teacher(repa.online_teacher, repa.layer, repa.revision, dtype=dtype)
        check_fit(teacher, config.data.path, manifest)
        return OnlineFeatures(teacher.to(device))
    return None
