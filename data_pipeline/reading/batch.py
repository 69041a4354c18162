"""From packed rows to the batch a training step sees: windows, splits into segments, keyed uniforms. Pure NumPy,
no reading.

A batch flattens B rows of R tokens to one axis of T = B*R tokens. A window is a piece of a document; a segment is a
window, or one of the two parts that a split cuts it into. Both tile the axis completely: a row's unfilled tail is a
window and a segment of role FILLER.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.keys import hashes, key, uniforms
from data_pipeline.reading.settings import Split

FILLER, PREFIX, SUFFIX = 0, 1, 2  # roles of segments


class RowId(NamedTuple):
    """Where a row came from; enough to find it again after a bad step."""

    ticket: int  # the row's global number in training order (held-out: its index in the split)
    split: str
    shard: int
    row: int
    epoch: int


@dataclass(frozen=True)
class CodedFeatures:
    """A teacher's cached features of T tokens as the codec wrote them: codes [T, C] and one scale per token [T]."""

    codes_TC: Tensor
    scales_T: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "CodedFeatures":
        return CodedFeatures(*(x.to(device, non_blocking=non_blocking) for x in (self.codes_TC, self.scales_T)))

    def pin_memory(self) -> "CodedFeatures":
        return CodedFeatures(self.codes_TC.pin_memory(), self.scales_T.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Lengths and roles stay Python lists: they are metadata, needed on the host before anything runs
    on a device.
    """

    tokens_T: Tensor  # int64
    window_lengths: list[int]  # sum = T
    segment_lengths: list[int]  # sum = T; refines the windows
    segment_roles: list[int]  # FILLER, PREFIX or SUFFIX
    segment_windows: list[int]  # index of the segment's window
    window_uniforms_W2: Tensor  # float64 in [0, 1); column 0 for the time t, column 1 for dropping the context
    row_keys_B: Tensor  # int64, non-negative: seeds of the rows' noise; always on the host, which seeds the generators
    row_tokens: int  # R
    rows: list[RowId]
    features: CodedFeatures | None = None

    @property
    def roles_T(self) -> Tensor:
        """Role of every token (int8), where the tokens are."""
        roles_S, lengths_S = self._on_device(torch.tensor([self.segment_roles, self.segment_lengths]))
        return torch.repeat_interleave(roles_S.to(torch.int8), lengths_S, output_size=len(self.tokens_T))

    def places(self, role: int) -> Tensor:
        """Where the tokens of a role stand, int64 [M] rising. The host knows how many there are: no device is asked."""
        ends = itertools.accumulate(self.segment_lengths)
        own = [(end, length) for end, length, one in zip(ends, self.segment_lengths, self.segment_roles) if one == role]
        ends_S, lengths_S = self._on_device(torch.tensor(own, dtype=torch.int64).view(-1, 2).t().contiguous())
        behind_S = ends_S - lengths_S.cumsum(0)
        num = sum(length for _, length in own)
        return torch.arange(num, device=ends_S.device) + torch.repeat_interleave(behind_S, lengths_S, output_size=num)

    def _on_device(self, numbers: Tensor) -> Tensor:
        """To where the tokens are, without waiting for what is computed there, which takes pinned memory."""
        device = self.tokens_T.device
        return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

    def num_tokens(self, *roles: int) -> int:
        """Number of tokens in segments of the given roles."""
        return sum(length for length, role in zip(self.segment_lengths, self.segment_roles) if role in roles)

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from which a GPU copies while host and device go on."""
        return replace(
            self,
            tokens_T=self.tokens_T.pin_memory(),
            window_uniforms_W2=self.window_uniforms_W2.pin_memory(),
            features=self.features and self.features.pin_memory(),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The batch with its tensors on the device."""
        return replace(
            self,
            tokens_T=self.tokens_T.to(device, non_blocking=non_blocking),
            window_uniforms_W2=self.window_uniforms_W2.to(device, non_blocking=non_blocking),
            features=self.features and self.features.to(device, non_blocking),
        )


class RowBlock:
    """Rows in ticket order from which micro-batches are cut.

    Windows, splits and keyed numbers are computed for all rows at once, each from its row's ticket alone: a row's
    windows, splits, times and noise are the same in whatever block and micro-batch, on whatever rank, it is met.

    Args:
        tokens_BR: int64 tokens of the rows.
        lengths: lengths of the windows of all rows in turn (a row's sum <= R; its tail becomes FILLER).
        counts_B: number of windows of each row.
        rows: identities of the rows.
        features: None, or codes [B, R, C] and scales [B, R].
        contexts: of a split of kind data, the tokens of each window's context.
    """

    def __init__(
        self,
        tokens_BR: np.ndarray,
        lengths: np.ndarray,
        counts_B: np.ndarray,
        rows: Sequence[RowId],
        seed: int,
        split: Split,
        features: tuple[np.ndarray, np.ndarray] | None = None,
        contexts: np.ndarray | None = None,
    ):
        self._tokens_BR, self._rows, self._features = tokens_BR, rows, features
        purpose = (seed, rows[0].split) if rows else (seed,)
        lengths_W, filler_W, counts_B = _with_tails(lengths, counts_B, tokens_BR.shape[1])
        ticket_B = np.array([row.ticket for row in rows], dtype=np.int64)
        ticket_W1 = np.repeat(ticket_B, counts_B)[:, None]
        window_ends = np.concatenate([[0], np.cumsum(counts_B)])
        index_W1 = (np.arange(len(filler_W)) - np.repeat(window_ends[:-1], counts_B))[:, None]
        self._window_ends = window_ends.tolist()
        self._uniforms_W2 = uniforms(_key(*purpose, "window"), ticket_W1, index_W1, np.arange(2))
        if split.kind == "data":
            cuts_W = np.zeros_like(lengths_W)
            cuts_W[~filler_W] = contexts
        else:
            cut_uniforms_W2 = uniforms(_key(*purpose, "cut"), ticket_W1, index_W1, np.arange(2))
            cuts_W = np.where(filler_W, 0, cut_places(lengths_W, cut_uniforms_W2, split))
        segment_lengths, segment_roles, self._segment_windows = _segments(lengths_W, filler_W, cuts_W, split)
        self._segment_lengths, self._segment_roles = segment_lengths.tolist(), segment_roles.tolist()
        self._window_lengths = lengths_W.tolist()
        self._segment_ends = [0, *np.cumsum(1 + (cuts_W > 0)).tolist()]
        row_keys_B = hashes(_key(*purpose, "row"), ticket_B) >> np.uint64(1)
        self._row_keys_B = row_keys_B.astype(np.int64)

    def batch(self, start: int, stop: int) -> Batch:
        """Batch of rows [start, stop)."""
        first, last = self._window_ends[start], self._window_ends[stop]
        segments = slice(self._segment_ends[first], self._segment_ends[last])
        features = None
        if self._features:
            codes_BRC, scales_BR = (torch.from_numpy(array[start:stop]) for array in self._features)
            features = CodedFeatures(codes_BRC.flatten(0, 1), scales_BR.flatten())
        return Batch(
            tokens_T=torch.from_numpy(self._tokens_BR[start:stop].reshape(-1)),
            window_lengths=self._window_lengths[first:last],
            segment_lengths=self._segment_lengths[segments],
            segment_roles=self._segment_roles[segments],
            segment_windows=(self._segment_windows[segments] - first).tolist(),
            window_uniforms_W2=torch.from_numpy(self._uniforms_W2[first:last]),
            row_keys_B=torch.from_numpy(self._row_keys_B[start:stop]),
            row_tokens=self._tokens_BR.shape[1],
            rows=list(self._rows[start:stop]),
            features=features,
        )


_key = lru_cache(maxsize=64)(key)


def cut_places(lengths_W: np.ndarray, uniforms_W2: np.ndarray, split: Split) -> np.ndarray:
    """Number of tokens in the first part of each window, 0 for a window that stays whole; of any kind but data."""
    if split.kind == "none":
        return np.zeros_like(lengths_W)
    divisible_W = lengths_W >= 2 * split.min_tokens
    if split.kind == "truncate":
        places_W = split.min_tokens + np.floor(uniforms_W2[:, 1] * (lengths_W - 2 * split.min_tokens + 1))
        divisible_W &= uniforms_W2[:, 0] < split.truncate_probability
    else:
        share_W = split.context_min + uniforms_W2[:, 0] * (split.context_max - split.context_min)
        places_W = np.clip(
            np.round(share_W * lengths_W), split.min_tokens, np.maximum(lengths_W - split.min_tokens, split.min_tokens)
        )
    return np.where(divisible_W, places_W, 0).astype(np.int64)


def _with_tails(
    lengths: np.ndarray, counts_B: np.ndarray, row_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows with the rows' unfilled tails among them: lengths, which of them are filler, and the rows' new counts."""
    ends_B = np.cumsum(counts_B)
    sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    tails_B = row_tokens - (sums[ends_B] - sums[ends_B - counts_B])
    unfilled_B = tails_B > 0
    lengths_W = np.insert(lengths.astype(np.int64), ends_B[unfilled_B], tails_B[unfilled_B])
    counts_B = counts_B + unfilled_B
    filler_W = np.zeros(len(lengths_W), dtype=bool)
    filler_W[np.cumsum(counts_B)[unfilled_B] - 1] = True
    return lengths_W, filler_W, counts_B


def _segments(
    lengths_W: np.ndarray, filler_W: np.ndarray, cuts_W: np.ndarray, split: Split
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments (length, role, window) of the windows after cutting."""
    first_W = np.where(cuts_W > 0, cuts_W, lengths_W)
    whole_role = SUFFIX if split.has_targets else PREFIX
    first_role_W = np.where(filler_W, FILLER, np.where(cuts_W > 0, PREFIX, whole_role))
    lengths_W2 = np.stack([first_W, lengths_W - first_W], axis=1)
    roles_W2 = np.stack([first_role_W, np.full_like(first_role_W, SUFFIX)], axis=1)
    window_W2 = np.repeat(np.arange(len(lengths_W))[:, None], 2, axis=1)
    present_W2 = lengths_W2 > 0
    return lengths_W2[present_W2], roles_W2[present_W2], window_W2[present_W2]
