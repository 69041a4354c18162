"""Prompts are what a split makes of a window: its context and its true continuation."""

import torch

from data_pipeline.reading.prompts import prompts_of
from tests.data_pipeline.made_batches import make_batch

BATCHES = [make_batch([(5, 9), (8, 4), (3, 20)], seed=1), make_batch([(10, 10), (0, 6), (7, 30)], seed=2)]


def test_prompts_are_windows_with_a_context_within_the_budget() -> None:
    prompts = prompts_of(BATCHES, max_tokens=40)
    assert [(len(p.context_T), len(p.target_T)) for p in prompts] == [(5, 9), (8, 4)]
    assert torch.equal(prompts[1].target_T, BATCHES[0].tokens_T[22:26])
    assert len(prompts_of(BATCHES, max_tokens=1)) == 1
    everything = prompts_of(BATCHES, max_tokens=1000)
    assert [(len(p.context_T), len(p.target_T)) for p in everything][2:] == [(3, 20), (10, 10), (7, 30)]
