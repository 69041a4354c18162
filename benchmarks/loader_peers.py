"""The loaders that users would take instead of this project's, each with the same packed rows in its own format.

Every peer gives batches of B rows, tokens int64 [B, R] and the lengths of each row's windows, in an order that it has shuffled in
the way its documentation recommends for text, in one process, from local files, pass after pass without end. `finished` makes of
them what a training step needs and `TrainLoader` gives. What stays this project's alone is the exact order, the origin of each
row, and the check that all tokens are in the vocabulary. A peer that is not installed is left out of the contest and named with
what installs it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch, RowBlock, RowId, Split
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows

Row = tuple[np.ndarray, np.ndarray]
Delivered = tuple[torch.Tensor, list[np.ndarray]]
SHUFFLE_ROWS = 256  # of the peers that shuffle in a buffer: more is better mixed, and slower
CHUNK_BYTES = 64 << 20  # what litdata and mosaicml-streaming recommend for a file


@dataclass(frozen=True)
class Job:
    """The prepared folder, where to write a peer's own format, and B."""

    data: Path
    manifest: Manifest
    folder: Path
    batch_rows: int

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.manifest.splits["train"])

    def rows(self) -> Iterator[Row]:
        """Tokens [R] in the shards' dtype and window lengths of every train row."""
        reader = TokenRows(str(self.data), self.manifest, "train")
        for index, shard in enumerate(self.manifest.splits["train"]):
            yield from zip(*reader.read(Span(0, index, 0, shard.rows)), strict=True)


@dataclass(frozen=True)
class Peer:
    """A loader: its modules, what installs them, how its files are written, and endless passes over them."""

    name: str
    module: str
    package: str
    write: Callable[[Job], None]
    batches: Callable[[Job], Iterator[Delivered]]

    def missing(self) -> str | None:
        """Why this peer cannot be measured here, and what to install; None if it can."""
        try:
            import_module(self.module)
        except Exception as error:  # a compiled dependency that does not fit raises what it likes
            return f"{type(error).__name__}: {error}; pip install {self.package}"
        return None


def collate(rows: Sequence[Row]) -> Delivered:
    """Rows as tokens int64 [B, R] and window lengths."""
    return torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64)), [lengths for _, lengths in rows]


def collate_fields(rows: Sequence[dict[str, np.ndarray]]) -> Delivered:
    """`collate` for rows that are dictionaries with the fields tokens and lengths."""
    return collate([(row["tokens"], row["lengths"]) for row in rows])


def finished(batches: Iterator[Delivered], split: Split) -> Iterator[Batch]:
    """The same batches with filler, keyed splits and keyed numbers: what a user has to do for each, by this project's own code."""
    ticket = 0
    for tokens_BR, lengths in batches:
        rows = [RowId(ticket + index, "train", -1, -1, 0) for index in range(len(lengths))]
        counts_B = np.fromiter(map(len, lengths), np.int64, len(lengths))
        block = RowBlock(tokens_BR.numpy(), np.concatenate(lengths), counts_B, rows, 0, split)
        yield block.batch(0, len(rows))
        ticket += len(rows)


def webdataset_batches(job: Job) -> Iterator[Delivered]:
    """Stock webdataset over the very shards."""
    import webdataset

    urls = [str(job.data / shard.name) for shard in job.manifest.splits["train"]]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(SHUFFLE_ROWS)
    pipeline = pipeline.decode().to_tuple("tokens.npy", "lengths.npy").batched(job.batch_rows, collation_fn=collate)
    while True:
        yield from pipeline


def write_litdata(job: Job) -> None:
    """Write litdata's chunks: a row is its tokens and its window lengths, two arrays."""
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(job.folder), chunk_bytes=CHUNK_BYTES)
    for index, (tokens, lengths) in enumerate(job.rows()):
        writer[index] = {"tokens": tokens, "lengths": lengths}
    writer.done()
    writer.merge()


def litdata_batches(job: Job) -> Iterator[Delivered]:
    """Endless batches of litdata's StreamingDataset under its StreamingDataLoader."""
    import litdata

    dataset = litdata.StreamingDataset(str(job.folder), shuffle=True, seed=0)
    loader = litdata.StreamingDataLoader(dataset, batch_size=job.batch_rows, num_workers=0, collate_fn=collate_fields)
    while True:
        yield from loader


def write_litdata_tokens(job: Job) -> None:
    """One stream of tokens, cut into blocks of one row; a row's lengths stand behind its tokens, filled up with zeros."""
    from litdata import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    block = job.manifest.row_tokens + _most_windows(job)
    loader = TokensLoader(block_size=block)
    writer = BinaryWriter(
        str(job.folder),
        chunk_size=block * (CHUNK_BYTES // (4 * block)),
        item_loader=loader,
        follow_tensor_dimension=True,
    )
    for index, (tokens, lengths) in enumerate(job.rows()):
        row = np.zeros(block, np.int32)
        row[: len(tokens)], row[len(tokens) : len(tokens) + len(lengths)] = tokens, lengths
        writer[index] = torch.from_numpy(row)
    writer.done()
    writer.merge()


def litdata_tokens_batches(job: Job) -> Iterator[Delivered]:
    """The loader that litdata recommends for pretraining language models."""
    import litdata

    row_tokens = job.manifest.row_tokens
    loader = litdata.TokensLoader(block_size=row_tokens + _most_windows(job))
    dataset = litdata.StreamingDataset(str(job.folder), item_loader=loader, shuffle=True, seed=0)

    def cut(rows: Sequence[torch.Tensor]) -> Delivered:
        blocks = torch.stack(list(rows))
        lengths = [tail[tail > 0] for tail in blocks[:, row_tokens:].numpy()]
        return blocks[:, :row_tokens].long(), lengths

    loader = litdata.StreamingDataLoader(dataset, batch_size=job.batch_rows, num_workers=0, collate_fn=cut)
    while True:
        yield from loader


def write_mosaic(job: Job) -> None:
    """Write MDS shards: a row is its tokens and its window lengths, two arrays."""
    from streaming import MDSWriter

    dtype = job.manifest.token_dtype
    columns = {"tokens": f"ndarray:{dtype}:{job.manifest.row_tokens}", "lengths": "ndarray:int32"}
    with MDSWriter(out=str(job.folder), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for tokens, lengths in job.rows():
            writer.write({"tokens": tokens, "lengths": lengths})


def mosaic_batches(job: Job) -> Iterator[Delivered]:
    """Endless batches of mosaicml-streaming's StreamingDataset, shuffled by its default algorithm, under its loader."""
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(job.folder), shuffle=True, batch_size=job.batch_rows)
    loader = StreamingDataLoader(dataset, batch_size=job.batch_rows, num_workers=0, collate_fn=collate_fields)
    while True:
        yield from loader


def write_hugging_face(job: Job) -> None:
    """Arrow files as `save_to_disk` writes them."""
    from datasets import Dataset, Features, List, Value

    features = Features(
        tokens=List(Value(job.manifest.token_dtype), length=job.manifest.row_tokens), lengths=List(Value("int32"))
    )
    columns = list(zip(*job.rows(), strict=True))
    dataset = Dataset.from_dict({"tokens": columns[0], "lengths": columns[1]}, features)
    dataset.save_to_disk(str(job.folder), num_shards=len(job.manifest.splits["train"]))


def hugging_face_batches(job: Job) -> Iterator[Delivered]:
    """Endless batches of the saved dataset, streamed, shuffled by shards and within a buffer."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(job.folder)).to_iterable_dataset(len(job.manifest.splits["train"]))
    dataset = dataset.shuffle(0, buffer_size=SHUFFLE_ROWS).with_format("numpy")
    while True:
        for rows in dataset.iter(job.batch_rows):
            yield torch.from_numpy(np.asarray(rows["tokens"]).astype(np.int64)), list(rows["lengths"])


def _most_windows(job: Job) -> int:
    """An upper bound on the number of windows of a row."""
    return job.manifest.row_tokens // job.manifest.min_window


PEERS = [
    Peer("webdataset", "webdataset", "webdataset", lambda job: None, webdataset_batches),
    Peer("litdata", "litdata", "litdata", write_litdata, litdata_batches),
    Peer("litdata_tokens", "litdata", "litdata", write_litdata_tokens, litdata_tokens_batches),
    Peer("mosaicml_streaming", "streaming", "mosaicml-streaming", write_mosaic, mosaic_batches),
    Peer("hugging_face", "datasets", "datasets", write_hugging_face, hugging_face_batches),
]
