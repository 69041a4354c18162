"""The plan of the second pass: which ranges of document hashes become which shards."""

import os
import resource
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.keys import key
from data_pipeline.prepare import assemble
from data_pipeline.prepare.assemble import Group, plan_groups
from data_pipeline.prepare.spill import write_chunk


def write_chunks(folder: Path, hashes: list[int], lengths: list[int], per_chunk: int = 1) -> list[Path]:
    """Documents of these upper hashes and numbers of tokens as chunks."""
    paths = []
    for start in range(0, len(hashes), per_chunk):
        chosen = slice(start, start + per_chunk)
        halves = np.array([[high, 0] for high in hashes[chosen]], np.uint64)
        paths.append(folder / f"{start:06d}.spill")
        write_chunk(
            paths[-1], halves, [np.ones(length, np.uint16) for length in lengths[chosen]], "uint16", [0] * len(halves)
        )
    return paths


def not_asked(group: Group) -> int:
    raise AssertionError(f"the tokens of {group} tell whether it has enough rows")


def ranges(groups: list[Group], split: str) -> list[tuple[int, int]]:
    """Of a split's groups, in units of 2^58."""
    return [(group.low >> 58, group.high >> 58) for group in groups if group.split == split]


def test_chunks_may_outnumber_the_files_that_a_process_may_open(tmp_path: Path) -> None:
    hashes = [i << 58 for i in range(64)]
    chunks = write_chunks(tmp_path, hashes, [1000] * 64)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        resource.setrlimit(resource.RLIMIT_NOFILE, (file.fileno() + 16, hard))
    try:
        groups = plan_groups(chunks, 64, 0.25, None, not_asked)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ranges(groups, "train") == [(16, 64)]
    assert ranges(groups, "heldout") == [(0, 16)]


def test_few_long_documents_are_divided_into_no_more_groups_than_have_documents(tmp_path: Path) -> None:
    """Thirty novels: 24 groups by their tokens, of which some would be empty."""
    hashes = [key("novel", number) for number in range(30)]
    chunks = write_chunks(tmp_path, hashes, [230_000] * 30, per_chunk=10)
    groups = plan_groups(chunks, 512, 0, None, not_asked)
    assert len(groups) in (2, 3, 4, 6, 8, 12, 16)
    assert sum(group.num_shards or 0 for group in groups) == 48
    for group in groups:
        assert any(group.low <= high < group.high for high in hashes)


def test_groups_are_as_many_as_the_tokens_allow_where_each_has_enough(tmp_path: Path) -> None:
    chunks = write_chunks(tmp_path, [i << 58 for i in range(64)], [1 << 15] * 64, per_chunk=16)
    groups = plan_groups(chunks, 512, 0, 16, not_asked)
    assert ranges(groups, "train") == [(8 * i, 8 * i + 8) for i in range(8)]
    assert [(group.first_shard, group.num_shards) for group in groups] == [(2 * i, 2) for i in range(8)]


def test_shards_are_no_more_than_their_names_can_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 10)
    monkeypatch.setattr(assemble, "MAX_SHARDS", 100)
    chunks = write_chunks(tmp_path, [i << 56 for i in range(256)], [10] * 256, per_chunk=256)
    groups = plan_groups(chunks, 64, 0.5, None, not_asked)
    assert len(ranges(groups, "heldout")) == 100
    assert groups[0].num_shards is None  # as many as the rows allow, which are 20
    groups = plan_groups(chunks, 1, 0, None, not_asked)
    assert sum(group.num_shards or 0 for group in groups) == 96


def test_held_out_documents_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "SHARD_TOKENS", 1000)
    chunks = write_chunks(tmp_path, [0, 1 << 58, 15 << 58, 40 << 58], [1000] * 4)
    groups = plan_groups(chunks, 512, 0.25, 1, not_asked)
    assert ranges(groups, "heldout") == [(0, 8), (8, 16)]  # three shards of 1,000 tokens, but none from 5 to 10


def test_where_tokens_do_not_tell_the_rows_decide(tmp_path: Path) -> None:
    """One of two groups has 500 rows' worth of tokens for 512 shards, and as many rows only if windows leave gaps."""
    hashes = [i << 58 for i in range(0, 64, 4)]
    chunks = write_chunks(tmp_path, hashes, [500 * 64 // 8] * 8 + [530 * 64 // 8] * 8)
    asked: list[Group] = []
    for rows, expected in ((512, [(0, 32), (32, 64)]), (511, [(0, 64)])):
        groups = plan_groups(chunks, 64, 0, 1024, lambda group, rows=rows: asked.append(group) or rows)
        assert ranges(groups, "train") == expected
    assert ranges(asked, "train") == [(0, 32)] * 2
