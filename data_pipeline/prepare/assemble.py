"""Second pass of prepare: the documents of a range of hashes become shuffled, packed rows and these the shards of a
group.

A group is packed as a whole and its rows are dealt to its shards, so that only its last row is part-filled and its
shards are equally long. Everything depends on the documents' hashes and the seed alone: not on the units, workers or
machines that encoded them.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.core.errors import UserError
from data_pipeline.core.keys import permutation
from data_pipeline.core.storage import write_text
from data_pipeline.format.manifest import MAX_SHARDS, shard_name
from data_pipeline.format.shards import token_members, write_shard
from data_pipeline.prepare.pack import fill_row, pack_rows, window_lengths
from data_pipeline.prepare.spill import Chunk, Documents, gather, tokens_below, without_duplicates

HASHES = 1 << 64
# A multiple of this many shards serves 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48 streams with equally many shards each.
SHARD_MULTIPLE = 48
SHARD_TOKENS = 4 << 20
GROUP_ROWS = 512  # the last row of a group is half empty on average: 0.1 % of 512


@dataclass(frozen=True)
class Group:
    """A range [low, high) of document hashes and the shards that its rows go to (None: as many as the rows allow)."""

    split: str
    index: int
    low: int
    high: int
    first_shard: int
    num_shards: int | None


@dataclass(frozen=True)
class AssembleTask:
    """What a worker needs to write a group's shards."""

    group: Group
    output: Path
    work: Path
    chunks: list[str]
    row_tokens: int
    min_window: int
    max_window: int
    token_dtype: str
    seed: int
    dedupe: bool
    has_contexts: bool = False


class Windows(NamedTuple):
    """Windows of a group's documents: where their tokens begin, how many they are, and how many of these are context, int64 [windows]."""

    starts: np.ndarray
    lengths: np.ndarray
    contexts: np.ndarray


def plan_groups(
    chunks: list[Path],
    row_tokens: int,
    heldout_fraction: float,
    num_shards: int | None,
    num_rows: Callable[[Group], int],
) -> list[Group]:
    """Divide the hashes into the held-out split and train, and train into groups of shards.

    The tokens allow a number of groups; of few long documents a range of hashes may hold none or too little for its shards:
    then there are fewer groups.

    Args:
        num_shards: train shards, or None for one per 4M tokens in multiples of 48, and 48 (or what the rows allow) for
            little data.
        num_rows: rows that a group has once it is packed; asked only where its tokens do not tell whether it has enough.
    """
    threshold = _heldout_threshold(chunks, heldout_fraction)
    heldout_tokens, all_tokens = tokens_below(chunks, [threshold, HASHES]).tolist()
    tokens = all_tokens - heldout_tokens
    multiples = min(max(1, -(-tokens // (SHARD_TOKENS * SHARD_MULTIPLE))), MAX_SHARDS // SHARD_MULTIPLE)
    shards = num_shards or SHARD_MULTIPLE * multiples
    possible = max(1, tokens // (GROUP_ROWS * row_tokens))

    def most(plans: Iterable[list[Group]]) -> list[Group]:
        return next(plan for plan in plans if _suffices(plan, chunks, row_tokens, num_rows))

    divisors = [divisor for divisor in range(min(shards, possible), 0, -1) if shards % divisor == 0]
    train = most(_divide("train", threshold, HASHES, groups, shards // groups) for groups in divisors)
    if num_shards is None and len(train) == 1:
        train = [replace(train[0], num_shards=None)]
    if not heldout_tokens:
        return train
    parts = range(min(max(1, heldout_tokens // SHARD_TOKENS), MAX_SHARDS), 0, -1)
    return train + most(_divide("heldout", 0, threshold, number, 1) for number in parts)


def assemble_group(task: AssembleTask) -> dict[str, Any]:
    """Write the group's shards and its result: their manifest entries and counts."""
    group = task.group
    documents, duplicates = _documents(task)
    starts, lengths, contexts = _windows(documents, task)
    rows = pack_rows(lengths, task.row_tokens)
    members = token_members(task.row_tokens, task.token_dtype, task.has_contexts)

    def arrays(windows: list[int]) -> tuple[np.ndarray, ...]:
        filled = fill_row(documents.tokens, starts, lengths, windows, task.row_tokens)
        return (*filled, contexts[windows].astype(np.int32)) if task.has_contexts else filled

    order = permutation(len(rows), task.seed, "rows", group.split, group.index)
    num_shards = _num_shards(group, len(rows))
    shards = []
    for shard in range(num_shards):
        chosen = [rows[row] for row in order[shard::num_shards]]
        name = shard_name(group.split, group.first_shard + shard)
        written = write_shard(task.output / name, members, map(arrays, chosen))
        counts = {"windows": sum(map(len, chosen)), "tokens": int(lengths[np.concatenate(chosen)].sum())}
        shards.append({"name": name, **written._asdict(), **counts})
    result = {"split": group.split, "documents": len(documents.ends), "duplicates": duplicates, "shards": shards}
    write_text(group_path(task.work, group), json.dumps(result))
    return result


def count_rows(task: AssembleTask) -> int:
    """Rows that the group has once it is packed."""
    return len(pack_rows(_windows(_documents(task)[0], task).lengths, task.row_tokens))


def group_path(work: Path, group: Group) -> Path:
    """Path of a group's result. The file exists once the group's shards are finished."""
    return work / "groups" / f"{group.split}-{group.low:016x}-{group.high:016x}.json"


def load_group(work: Path, group: Group) -> dict[str, Any] | None:
    """The result of a finished group."""
    path = group_path(work, group)
    return json.loads(path.read_bytes()) if path.exists() else None


def _divide(split: str, low: int, high: int, number: int, num_shards: int) -> list[Group]:
    """Even ranges of the hashes [low, high), of `num_shards` shards each."""
    bounds = [low + (high - low) * index // number for index in range(number + 1)]
    return [
        Group(split, index, bounds[index], bounds[index + 1], index * num_shards, num_shards) for index in range(number)
    ]


def _suffices(groups: list[Group], chunks: list[Path], row_tokens: int, num_rows: Callable[[Group], int]) -> bool:
    """Whether every group has at least one row for each of its shards; a single group always passes."""
    if len(groups) == 1:
        return True
    tokens = np.diff(tokens_below(chunks, [group.low for group in groups] + [groups[-1].high])).tolist()
    return all(tokens) and all(
        -(-count // row_tokens) >= (group.num_shards or 1) or num_rows(group) >= (group.num_shards or 1)
        for group, count in zip(groups, tokens, strict=True)
    )


def _documents(task: AssembleTask) -> tuple[Documents, int]:
    """The group's documents, and how many were dropped as duplicates."""
    group = task.group
    documents = gather([Chunk(task.work / "bundles" / name).read(group.low, group.high) for name in task.chunks])
    kept = without_duplicates(documents) if task.dedupe else documents
    return kept, len(documents.ends) - len(kept.ends)


def _windows(documents: Documents, task: AssembleTask) -> Windows:
    """All windows, shuffled by key. A pair is one window: it was cut to fit when it was encoded."""
    starts: list[int] = []
    lengths: list[int] = []
    contexts: list[int] = []
    sizes = documents.lengths()
    for start, size, context in zip((documents.ends - sizes).tolist(), sizes.tolist(), documents.contexts.tolist()):
        for length in window_lengths(size, task.min_window, task.max_window):
            starts.append(start)
            lengths.append(length)
            contexts.append(context)
            start += length
    order = permutation(len(starts), task.seed, "windows", task.group.split, task.group.index)
    return Windows(*(np.array(values, np.int64)[order] for values in (starts, lengths, contexts)))


def _heldout_threshold(chunks: list[Path], fraction: float) -> int:
    """Documents with an upper hash below this are held out: the fraction, of little data at least one, but never
    all.
    """
    if fraction == 0:
        return 0
    threshold = max(int(fraction * HASHES), min(Chunk(path).first_hash() for path in chunks) + 1)
    below, tokens = tokens_below(chunks, [threshold, HASHES])
    return threshold if below < tokens else 0


def _num_shards(group: Group, num_rows: int) -> int:
    """Shards of the group: as planned, or the largest that serve many stream counts and that the rows suffice for."""
    if group.num_shards is None:
        return max(n for n in (1, 2, 3, 4, 6, 12, 24, SHARD_MULTIPLE) if n <= num_rows)
    if num_rows < group.num_shards:
        raise UserError(
            f"{num_rows} rows are too few for {group.num_shards} {group.split} shards: give more text, a smaller "
            f"--row-tokens, or --shards {num_rows}"
        )
    return group.num_shards
