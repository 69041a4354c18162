"""Bytes of states: what does not depend on DeepSpeed here; what does is measured by benchmarks.plan and below, slowly."""

import pytest

from benchmarks.plan import MODELS, STATES, outline, states_ratios
from pretrain.engine.optimizer_settings import AdamWSettings, MuonSettings
from pretrain.plan.states import Parameters, sent_bytes, states

MODEL = outline(*MODELS["ar"][:2], "meta").trained
ADAMW = Parameters.of(MODEL, AdamWSettings(lr=1e-3))


@pytest.mark.slow
def test_planned_states_are_what_deepspeed_allocates() -> None:
    assert all(0.95 <= ratio <= 1.05 for ratio in states_ratios(STATES))


def test_muon_keeps_a_state_less_of_its_matrices() -> None:
    muon = Parameters.of(MODEL, MuonSettings(lr=1e-3))
    assert ADAMW.state_bytes == 16 * ADAMW.elements
    assert muon.state_bytes == ADAMW.state_bytes - 4 * muon.matrices
    assert muon.elements == ADAMW.elements == sum(p.numel() for p in MODEL.parameters())
    assert muon.matrices > 0 == ADAMW.matrices


@pytest.mark.parametrize("bf16", [False, True])
def test_a_later_stage_takes_less(bf16: bool) -> None:
    lasting = [states(ADAMW, stage, 64, bf16).lasting for stage in (1, 2)]
    assert lasting == sorted(lasting, reverse=True)
    assert states(ADAMW, 3, 64, bf16).weights < states(ADAMW, 2, 64, bf16).weights
    assert states(ADAMW, 2, 64, bf16, offload=True).states == 0


def test_one_rank_sends_nothing_and_gathering_costs_more() -> None:
    assert sent_bytes(ADAMW, 0, 1, False) == 0
    assert sent_bytes(ADAMW, 3, 8, True) > sent_bytes(ADAMW, 2, 8, True) == sent_bytes(ADAMW, 1, 8, True)
    assert sent_bytes(ADAMW, 2, 8, True, micro_batches=4) > sent_bytes(ADAMW, 1, 8, True, micro_batches=4)
