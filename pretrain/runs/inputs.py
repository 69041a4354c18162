"""What a run reads: the prepared data, and everything frozen. Without torch, so that what is not there is said at once."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import read_bytes
from data_pipeline.format.manifest import MANIFEST_NAME, Manifest, give
from pretrain.config.registry import stage_kind
from pretrain.config.schema import RunConfig


@dataclass(frozen=True)
class Inputs:
    """What a run reads: the prepared data, and the fingerprints of all that is frozen, by the key that names it."""

    manifest: Manifest
    fingerprints: dict[str, str]


def find_inputs(config: RunConfig) -> Inputs:
    """What the run would read. Raises: UserError for what is not there."""
    manifest, own = config.data.manifest(), stage_kind(config.stage).load("inputs")
    return Inputs(manifest, own(config) if own else {})


def read_once_a_host(config: RunConfig, rank: int, local_rank: int, of_rank_0: Callable[[bytes], bytes]) -> None:
    """Give the manifests that rank 0 reads to every rank but the first of each other host, which reads its own. Collective.

    `of_rank_0` gives rank 0's bytes to all ranks. A host whose files differ is refused later (ranks/agreement.py); what cannot be read is
    left to `find_inputs`, which says why.
    """
    for folder in (config.data.path, config.features_folder()):
        if folder is None:
            continue
        text = b""
        if rank == 0:
            with contextlib.suppress(OSError, UserError):
                text = read_bytes(folder, MANIFEST_NAME)
        text = of_rank_0(text)
        if text and (rank == 0 or local_rank > 0):
            give(folder, text)
