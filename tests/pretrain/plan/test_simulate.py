"""The simulation is a function of its seed, agrees with the formula where that holds, and loses no time."""

from dataclasses import replace

import pytest

from data_pipeline.core.errors import UserError
from pretrain.plan.reliability import DAY_S, between_failures_s, daly_s, goodput
from pretrain.plan.simulate import POLICIES, Cluster, Policy, simulate, sweep

OPT_NODES = Cluster(1000, spares=32, failures=16, interval_s=230, checkpoint_s=5, write_s=60, restart_s=300)


@pytest.mark.parametrize(("nodes", "failures"), [(1, 16.0), (128, 3.8), (1000, 16.0), (2048, 3.8)])
@pytest.mark.parametrize("factor", [0.4, 1.0, 2.5])
def test_agrees_with_young_and_daly_within_a_percent(nodes: int, failures: float, factor: float) -> None:
    between_s = between_failures_s(nodes, failures)
    interval_s = factor * daly_s(10, between_s)
    cluster = Cluster(nodes, failures=failures, interval_s=interval_s, checkpoint_s=10, restart_s=300, repair_s=0)
    found = simulate(cluster, days=4000 * between_s / DAY_S)
    assert found.goodput == pytest.approx(goodput(interval_s, 10, 300, between_s), rel=0.01)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_second_is_accounted_for(policy: Policy) -> None:
    found = simulate(replace(OPT_NODES, policy=policy, slow=5, spares=2), 60)
    shares = (found.goodput, found.lost, found.restarting, found.waiting, found.checkpoints, found.slower)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0
    assert found.failures > 100
    assert simulate(replace(OPT_NODES, policy=policy, slow=5, spares=2), 60) == found


def test_spares_and_shrinking_save_the_waiting() -> None:
    alone, spared = simulate(replace(OPT_NODES, spares=0), 60), simulate(OPT_NODES, 60)
    shrinking = simulate(replace(OPT_NODES, spares=0, policy="shrink"), 60)
    assert alone.waiting > 0.5
    assert spared.waiting < 0.01
    assert shrinking.waiting == 0 < shrinking.slower
    assert alone.goodput < shrinking.goodput < spared.goodput
    assert spared.bought == pytest.approx(spared.goodput * 1000 / 1032)


def test_97_percent_at_opts_rate_needs_fast_restarts_and_spares() -> None:
    best = replace(OPT_NODES, interval_s=103, checkpoint_s=1, write_s=15, restart_s=30)
    assert simulate(best, 200).goodput >= 0.97
    assert simulate(replace(best, restart_s=300), 200).goodput < 0.97
    assert simulate(replace(best, spares=4), 200).goodput < 0.97


def test_slow_nodes_cost_what_they_slow() -> None:
    cluster = Cluster(100, failures=0, slow=20, slowdown=0.5, found_s=6 * 3600, planned_s=0, checkpoint_s=0)
    found = simulate(cluster, 500)  # a slow node every 12 hours, found after 6: a third of the time at half the speed
    assert found.slower == pytest.approx(1 / 6, rel=0.1)


def test_an_interval_each() -> None:
    outcomes = sweep(OPT_NODES, [20.0, 230.0, 4000.0], 30)
    assert outcomes[1].goodput == max(one.goodput for one in outcomes)


def test_impossible_clusters_are_refused() -> None:
    with pytest.raises(UserError, match="0 nodes"):
        Cluster(0)
