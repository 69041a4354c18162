"""The teacher's section of a configuration: read by stage 1 and by the feature cache."""

from typing import Annotated

from pydantic import NonNegativeFloat, NonNegativeInt

from data_pipeline.core.settings import OnResume, Section

CODEC_NAME = "codec.safetensors"
"""In the folder of a cache, by which it is known before it is finished."""


class Repa(Section):
    """Representation alignment of the VAE's encoder with a frozen language model (stage 1)."""

    weight: NonNegativeFloat = 1.0
    """lambda of the loss; 0 leaves the teacher out [paper: 1]."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the weight rises linearly from 0."""
    features: Annotated[str | None, OnResume.FREE] = None  # their fingerprint is compared by itself
    """Folder of cached features (textldm cache)."""
    teacher: str | None = None
    """Hub id or folder of the causal language model whose features the cache holds; textldm cache reads it here."""
    revision: str | None = None
    """Commit of the teacher, cached or online, on the hub."""
    online_teacher: str | None = None
    """Instead of a cache: hub id or folder of a causal language model, run in the loop."""
    layer: int = -3
    """Hidden state that is the target, index into transformers' hidden_states [paper: third-to-last]."""
