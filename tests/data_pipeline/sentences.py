"""A small prepared folder with a tokenizer of its own: sentences of a grammar of ten words."""

from pathlib import Path

import numpy as np

from data_pipeline.format.manifest import Manifest, ShardInfo, shard_name
from data_pipeline.format.shards import token_members, write_shard
from data_pipeline.text.tokenization import load_tokenizer, train_tokenizer

ROW_TOKENS = 64


def write_data(folder: Path) -> Manifest:
    """A prepared folder: sentences of a small grammar, 5 train shards and 1 held-out shard."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "dog", "sees", "likes", "red", "old", "tree", "and", "house"]
    texts = [" ".join(rng.choice(words, size=int(rng.integers(5, 40)))) + "." for _ in range(500)]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save(folder / "tokenizer")
    documents = iter([tokenizer.backend.encode(text).ids[:48] for text in texts] * 10)
    splits: dict[str, list[ShardInfo]] = {}
    for split, counts in (("train", [30, 41, 25, 33, 28]), ("heldout", [20])):
        splits[split] = []
        for index, num_rows in enumerate(counts):
            rows = []
            for _ in range(num_rows):
                row, lengths = [], []
                while len(row) + len(document := next(documents)) <= ROW_TOKENS:
                    row += document
                    lengths.append(len(document))
                padded = np.array(row + [0] * (ROW_TOKENS - len(row)), np.uint16)
                rows.append((padded, np.array(lengths, np.int32)))
            name = shard_name(split, index)
            written = write_shard(folder / name, token_members(ROW_TOKENS, "uint16"), rows)
            splits[split].append(
                ShardInfo(
                    name=name,
                    windows=sum(len(lengths) for _, lengths in rows),
                    tokens=sum(int(lengths.sum()) for _, lengths in rows),
                    **written._asdict(),
                )
            )
    manifest = Manifest.create(
        row_tokens=ROW_TOKENS, token_dtype="uint16", min_window=1, max_window=48, seed=0, heldout_fraction=0.1,
        dedupe=False, tokenizer=load_tokenizer(folder / "tokenizer").info, splits=splits, source="test", statistics={},
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return manifest
