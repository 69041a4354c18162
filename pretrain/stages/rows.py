"""A run's own rows outside the loop: the first training rows and the held-out ones, with its features."""

from collections.abc import Iterator

from data_pipeline.reading.batch import Batch
from data_pipeline.reading.loader import TrainLoader, heldout_batches
from data_pipeline.reading.settings import Split
from pretrain.config.schema import RunConfig


def training_batches(
    config: RunConfig, num_rows: int, micro_batch_rows: int = 1, split: Split | None = None
) -> list[Batch]:
    """About `num_rows` of the run's training rows: whole steps from the first on. `split`: if they are cut otherwise than training does."""
    data = config.data
    steps = max(1, -(-num_rows // data.rows_per_step))
    with TrainLoader(
        data.path,
        config.features_folder(),
        seed=config.train.seed,
        streams=data.streams,
        rows_per_step=data.rows_per_step,
        micro_batch_rows=micro_batch_rows,
        split=split or data.split.in_training,
        workers=0,
        **data.reading(),
    ) as loader:
        return [batch for _ in range(steps) for batch in loader.next_step()]


def heldout_rows(
    config: RunConfig, max_rows: int, *, micro_batch_rows: int | None = None, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """A rank's batches of the run's first held-out rows."""
    data = config.data
    return heldout_batches(
        data.path,
        config.features_folder(),
        split=data.split,
        seed=config.train.seed,
        micro_batch_rows=micro_batch_rows or config.data.micro_batch(world_size),
        rank=rank,
        world_size=world_size,
        max_rows=max_rows,
        **data.reading(),
    )
