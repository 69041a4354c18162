"""Young's and Daly's formulas against each other and against what is largest."""

import pytest

from pretrain.plan.reliability import LLAMA_3, OPT, between_failures_s, daly_s, goodput, young_s


def test_mean_time_between_failures_of_known_clusters() -> None:
    assert between_failures_s(2048, LLAMA_3) / 3600 == pytest.approx(
        3.1, rel=0.03
    )  # one every three hours on 16,384 GPUs
    assert between_failures_s(124, OPT) / 3600 == pytest.approx(12, rel=0.02)  # 992 GPUs: twice a day and more


@pytest.mark.parametrize("between_s", [600.0, 5400.0, 1e6])
@pytest.mark.parametrize("checkpoint_s", [1.0, 30.0])
def test_dalys_interval_is_where_goodput_is_largest(between_s: float, checkpoint_s: float) -> None:
    best = daly_s(checkpoint_s, between_s)
    top = goodput(best, checkpoint_s, 120, between_s)
    assert all(goodput(best * factor, checkpoint_s, 120, between_s) <= top * 1.0001 for factor in (0.5, 0.8, 1.25, 2))
    assert top < 1


def test_young_and_daly_agree_where_failures_are_rare() -> None:
    assert daly_s(1, 1e7) == pytest.approx(young_s(1, 1e7), rel=1e-3)
    assert daly_s(100, 10) == 10  # a checkpoint that takes longer than two failures: no series any more


def test_a_job_that_never_gets_through_has_no_goodput() -> None:
    assert goodput(1e6, 10, 300, 1000) == 0.0
