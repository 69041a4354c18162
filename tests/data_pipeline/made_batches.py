"""Batches of one row, made by hand."""

import torch

from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch

ROW_TOKENS = 64


def make_batch(windows: list[tuple[int, int]], seed: int = 0) -> Batch:
    """One row of windows of so many context and target tokens (a context may be 0 tokens), the rest filler."""
    lengths, roles, of_window, window_lengths = [], [], [], []
    for index, (context, target) in enumerate(windows):
        for length, role in ((context, PREFIX), (target, SUFFIX)):
            if length:
                lengths.append(length)
                roles.append(role)
                of_window.append(index)
        window_lengths.append(context + target)
    if rest := ROW_TOKENS - sum(lengths):
        lengths.append(rest)
        roles.append(FILLER)
        of_window.append(len(windows))
        window_lengths.append(rest)
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        tokens_T=torch.randint(1, 20, (ROW_TOKENS,), generator=generator),
        window_lengths=window_lengths,
        segment_lengths=lengths,
        segment_roles=roles,
        segment_windows=of_window,
        window_uniforms_W2=torch.rand(len(window_lengths), 2, generator=generator, dtype=torch.float64),
        row_keys_B=torch.tensor([seed + 1]),
        row_tokens=ROW_TOKENS,
        rows=[],
    )
