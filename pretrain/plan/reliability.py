"""How often to write checkpoints, and what failures cost: Young's and Daly's formulas.

M mean seconds between failures of the whole job, c seconds that training stands still for a checkpoint, tau seconds of training between
two of them, R seconds from a failure to training again. With failures that come independently of the past, the expected time for
tau seconds of training is M exp(R / M) (exp((tau + c) / M) - 1) (Daly 2006, https://doi.org/10.1016/j.future.2004.11.016), so

    goodput(tau) = tau / (M exp(R / M) (exp((tau + c) / M) - 1))

which is largest near Young's sqrt(2 c M), and still nearer Daly's series. A checkpoint that is written beside training counts only when
it is complete; what is lost meanwhile is a longer restart.
"""

import math

DAY_S = 86_400.0
LLAMA_3, OPT = 3.8, 16.0
"""Failures per 1,000 node-days of 8 GPUs: Llama 3 (arXiv 2407.21783: 419 in 54 days on 2,048 nodes), OPT-175B (arXiv 2205.01068)."""


def between_failures_s(nodes: int, failures_per_1000_node_days: float) -> float:
    """M of a job on so many nodes, in seconds."""
    return 1000.0 * DAY_S / (nodes * failures_per_1000_node_days)


def young_s(checkpoint_s: float, between_s: float) -> float:
    """Young's interval sqrt(2 c M)."""
    return math.sqrt(2 * checkpoint_s * between_s)


def daly_s(checkpoint_s: float, between_s: float) -> float:
    """Daly's interval, of higher order; M where a checkpoint takes longer than 2 M."""
    ratio = checkpoint_s / (2 * between_s)
    if ratio >= 1:
        return between_s
    return max(checkpoint_s, young_s(checkpoint_s, between_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s)


def goodput(interval_s: float, checkpoint_s: float, restart_s: float, between_s: float) -> float:
    """Share of time that is training which no failure undoes."""
    if (interval_s + checkpoint_s + restart_s) / between_s > 700:
        return 0.0
    spent = between_s * math.exp(restart_s / between_s) * math.expm1((interval_s + checkpoint_s) / between_s)
    return interval_s / spent
