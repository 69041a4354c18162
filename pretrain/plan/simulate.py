"""A cluster's weeks in seconds: a discrete-event simulation of failures, slow nodes, checkpoints, restarts, spares and shrinking.

Nodes fail one by one, independently of the past. The job then loses what no complete checkpoint has, and after `restart_s` goes on

    wait      on as many nodes as before, once a spare or the repaired node is there
    shrink    on those that are left, slower, and takes repaired nodes back at once, with a planned restart

A failure during a restart begins the restart anew. A slow node slows the whole job until it is found, and is then replaced in a planned
restart. Goodput is useful training over what all nodes of the job, without spares, could have done; `bought` counts spares too.
"""

import heapq
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from data_pipeline.core.errors import UserError
from pretrain.plan.reliability import DAY_S, LLAMA_3

Policy = Literal["wait", "shrink"]
POLICIES: tuple[Policy, ...] = ("wait", "shrink")


@dataclass(frozen=True)
class Cluster:
    """What is simulated. Seconds throughout.

    Attributes:
        nodes: of the job; spares: further ones, at hand.
        failures: per 1,000 node-days; slow: nodes that become slow, likewise.
        interval_s: training between checkpoints; checkpoint_s: for which training stands still; write_s: until it is complete.
        restart_s: from a failure to training again, detection included; planned_s: of a restart after a checkpoint that was asked for.
        repair_s: from a node's failure until it is a spare, 0: at once.
        slowdown: speed of a job with a slow node; found_s: until it is replaced.
    """

    nodes: int
    spares: int = 0
    failures: float = LLAMA_3
    interval_s: float = 1800.0
    checkpoint_s: float = 5.0
    write_s: float = 0.0
    restart_s: float = 300.0
    planned_s: float = 120.0
    repair_s: float = DAY_S
    slow: float = 0.0
    slowdown: float = 0.7
    found_s: float = 3600.0
    policy: Policy = "wait"

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.interval_s <= 0 or min(self.failures, self.slow, self.restart_s, self.repair_s) < 0:
            raise UserError(
                f"{self.nodes} nodes, an interval of {self.interval_s:g} s, {self.failures:g} failures: expected at least one node,"
                " an interval above 0 and no negative number"
            )


@dataclass(frozen=True)
class Outcome:
    """Shares of the time of all nodes of the job: `goodput`, and of what was not: lost work, restarts, waiting for nodes, checkpoints."""

    goodput: float
    lost: float
    restarting: float
    waiting: float
    checkpoints: float
    slower: float
    failures: int
    bought: float


def simulate(cluster: Cluster, days: float, seed: int = 0) -> Outcome:
    """So many days of a cluster; the same seed gives the same days."""
    return _Run(cluster, days * DAY_S, np.random.default_rng(seed)).outcome()


class _Run:
    def __init__(self, cluster: Cluster, horizon_s: float, draw: np.random.Generator) -> None:
        self.cluster, self.horizon, self.draw = cluster, horizon_s, draw
        self.now = self.useful = self.lost = self.restarting = self.waiting = self.checkpoints = self.slower = 0.0
        self.active, self.spares, self.failures = cluster.nodes, cluster.spares, 0
        self.repairs: list[float] = []

    def outcome(self) -> Outcome:
        while self.now < self.horizon:
            self._train()

        def share(part: float) -> float:
            return float(part / self.now)

        useful, cluster = share(self.useful), self.cluster
        return Outcome(
            useful, share(self.lost), share(self.restarting), share(self.waiting), share(self.checkpoints), share(self.slower),
            self.failures, useful * cluster.nodes / (cluster.nodes + cluster.spares),
        )  # fmt: skip

    def _next(self, rate: float) -> float:
        """Seconds until the next of events per 1,000 node-days on the nodes that work."""
        if rate <= 0 or self.active < 1:
            return np.inf
        return float(self.draw.exponential(1000.0 * DAY_S / (rate * self.active)))

    def _train(self) -> None:
        """From a start to what ends it: a failure, a slow node that is found, or a repaired node that is missed."""
        cluster = self.cluster
        failure, slow = self._next(cluster.failures), self._next(cluster.slow)
        found = slow + cluster.found_s
        back = self.repairs[0] - self.now if self.repairs and self.active < cluster.nodes else np.inf
        lasted = min(failure, found, back, max(1.0, self.horizon - self.now))
        self._count(lasted, min(slow, lasted), unplanned=lasted == failure)
        self.now += lasted
        self._repaired()
        if lasted == failure:
            self._fail()
            self._restart(cluster.restart_s)
        elif lasted in (found, back):
            if lasted == back:
                self._take_back()
            self._restart(cluster.planned_s)

    def _count(self, lasted: float, fast: float, unplanned: bool) -> None:
        """Share out the time that a life of the job lasted; an unplanned end loses what is behind the last complete checkpoint."""
        cluster = self.cluster
        share = self.active / cluster.nodes
        cycle = cluster.interval_s + cluster.checkpoint_s
        kept = lasted
        if unplanned:
            kept = max(0.0, np.floor((lasted - cluster.write_s) / cycle)) * cycle
        work = kept * cluster.interval_s / cycle
        slowed = max(0.0, kept - fast) / max(kept, 1e-9) * work
        useful = share * (work - (1 - cluster.slowdown) * slowed)
        self.useful += useful
        self.checkpoints += kept - work
        self.slower += work - useful
        self.lost += lasted - kept

    def _fail(self) -> None:
        self.failures += 1
        self.active -= 1
        if self.cluster.repair_s == 0:
            self.spares += 1
        else:
            heapq.heappush(self.repairs, self.now + self.cluster.repair_s)
        self._take_spares()

    def _take_spares(self) -> None:
        taken = min(self.spares, self.cluster.nodes - self.active)
        self.active, self.spares = self.active + taken, self.spares - taken

    def _repaired(self) -> None:
        while self.repairs and self.repairs[0] <= self.now:
            heapq.heappop(self.repairs)
            self.spares += 1

    def _take_back(self) -> None:
        self._repaired()
        self._take_spares()

    def _restart(self, seconds: float) -> None:
        """Until training goes on: with all nodes, or, shrinking, with any."""
        while True:
            wanted = self.cluster.nodes if self.cluster.policy == "wait" else 1
            while self.active < wanted:
                until = self.repairs[0]
                self.waiting += max(0.0, until - self.now)
                self.now = max(self.now, until)
                self._take_back()
            failure = self._next(self.cluster.failures)
            self.restarting += min(failure, seconds)
            self.now += min(failure, seconds)
            self._repaired()
            if failure >= seconds:
                self._take_spares()  # what was repaired meanwhile
                return
            self._fail()
            seconds = self.cluster.restart_s


def sweep(cluster: Cluster, intervals_s: list[float], days: float, seed: int = 0) -> list[Outcome]:
    """One outcome an interval."""
    return [simulate(replace(cluster, interval_s=interval), days, seed) for interval in intervals_s]
