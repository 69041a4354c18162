"""The plan of the second pass: which ranges of document hashes become which shards."""

import os
import resource
from pathlib import Path

import numpy as np

from data_pipeline.assemble import plan_groups
from data_pipeline.spill import write_chunk


def write_chunks(folder: Path, hashes: list[int], lengths: list[int], per_chunk: int = 1) -> list[Path]:
    """Documents of these upper hashes and numbers of tokens as chunks."""
    paths = []
    for start in range(0, len(hashes), per_chunk):
        chosen = slice(start, start + per_chunk)
        halves = np.array([[high, 0] for high in hashes[chosen]], np.uint64)
        paths.append(folder / f"{start:06d}.spill")
        write_chunk(paths[-1], halves, [np.ones(length, np.uint16) for length in lengths[chosen]], "uint16")
    return paths


def test_chunks_may_outnumber_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    hashes = [i << 58 for i in range(64)]
    chunks = write_chunks(tmp_path, hashes, [1000] * 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 16, hard))
    try:
        groups = plan_groups(chunks, 64, 0.25, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [(group.split, group.low >> 58, group.high >> 58) for group in groups] == [
        ("train", 16, 64),
        ("heldout", 0, 16),
    ]
