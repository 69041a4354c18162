"""Batches measured side by side: the same results in the same order, and nothing left behind."""

import threading

import pytest
import torch

from pretrain.diagnose.side_by_side import each
from tests.data_pipeline.made_batches import make_batch

BATCHES = [make_batch([(5, 9), (8, 4)], seed=seed) for seed in range(6)]


@pytest.fixture(autouse=True)
def two_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_batches_are_measured_at_once_and_their_results_come_in_order() -> None:
    meeting, ticks = threading.Barrier(2, timeout=30), []

    def measured(batch, number):  # type: ignore[no-untyped-def]
        meeting.wait()  # nobody comes through alone
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()
        return number, int(batch.row_keys_B[0])

    found = each(measured, BATCHES, range(6), tick=lambda: ticks.append(0))
    assert found == [(number, int(batch.row_keys_B[0])) for number, batch in enumerate(BATCHES)]
    assert len(ticks) == 6
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


def test_a_failure_comes_out_and_threads_are_given_back() -> None:
    def failing(batch):  # type: ignore[no-untyped-def]
        raise ValueError(f"row {int(batch.row_keys_B[0])}")

    with pytest.raises(ValueError, match="row"):
        each(failing, BATCHES, tick=lambda: None)
    assert torch.get_num_threads() == 2


def test_with_one_thread_one_after_the_other_in_this_thread() -> None:
    torch.set_num_threads(1)
    assert set(each(lambda batch: threading.get_ident(), BATCHES, tick=lambda: None)) == {threading.get_ident()}
