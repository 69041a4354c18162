"""Nats a token: the verdicts by which every stage that gives probabilities to text is judged, and how they are drawn."""

from collections.abc import Iterable

import torch
from matplotlib.axes import Axes

from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.counts import token_counts
from modeling.token_statistics import unigram_nats
from pretrain.config.schema import RunConfig
from pretrain.diagnose.diagnosis import phase
from pretrain.diagnose.page import FOREIGN, MODEL, TRUE
from pretrain.diagnose.verdicts import Figures, Verdict, above, at_most, with_error


def unigram_figures(config: RunConfig, batches: Iterable[Batch]) -> tuple[Figures, torch.Tensor]:
    """`unigram_nats` of the batches' targets, and the tokens' counts [V] over all of the training shards from which it follows."""
    with phase("tokens of the training split"):
        counts_V = token_counts(config.data.path, config.data.manifest(), **config.data.reading())
    targets_M = torch.cat([batch.tokens_T[batch.places(SUFFIX)].cpu() for batch in batches])
    return {"unigram_nats": unigram_nats(counts_V, targets_M)}, counts_V


def nats_verdicts(figures: Figures) -> list[Verdict]:
    """Does it know language (check 1), and does it read the context (5)? Two standard errors must lie between it and what does not."""
    nats, error = figures["nats_per_token"], figures["nats_per_token_error"]
    worth, worth_error = figures["context_nats"], figures["context_nats_error"]
    teacher = figures.get("teacher_nats")
    return [
        Verdict(1, "nats per token", with_error(nats, error, ".4f")),
        *([Verdict(1, "the teacher's nats per token", f"{teacher:.4f}")] if teacher is not None else []),
        at_most(1, "nats per token + 2 errors, below the unigram's", nats + 2 * error, figures["unigram_nats"]),
        above(5, "nats that the context is worth", worth, 2 * worth_error, error=worth_error),
    ]


def draw_nats(axes: Axes, figures: Figures) -> None:
    """Checks 1 and 5: what the model knows, beside what knows no neighbours and what is given another's context."""
    nats, worth = figures["nats_per_token"], figures["context_nats"]
    bars = {"unigram": figures["unigram_nats"], "foreign context": nats + worth, "held out": nats}
    bars["training rows"] = figures["training_nats"]
    axes.bar(list(bars), list(bars.values()), 0.6, color=[FOREIGN, FOREIGN, MODEL, TRUE])
    axes.set_title("1, 5  nats per token")


def draw_bound(axes: Axes, figures: Figures) -> None:
    """Checks 1 and 5: the bound, and its curve over t0 with one time for all tokens."""
    nats, unigram = figures["nats_per_token"], figures["unigram_nats"]
    axes.plot(figures["nats_times"], figures["nats_curve"], "o-", color=MODEL, ms=3, label="one time for all, at t0")
    axes.axhline(nats, color=MODEL, lw=1.2, label="bound")
    axes.axhline(unigram, color=FOREIGN, lw=1.2, label="unigram")
    if (teacher := figures.get("teacher_nats")) is not None:
        axes.axhline(teacher, color=TRUE, lw=1.2, label="teacher")
    axes.axhline(nats + figures["context_nats"], color=FOREIGN, lw=1, ls=":", label="foreign context")
    # Near t0 = 0 a bound may be anything: the picture is of what lies around the least and the unigram's.
    compared = [nats, unigram, figures.get("teacher_nats", nats)]
    lowest, highest = min(compared), max(compared)
    margin = 0.3 * (highest - lowest) + 0.05
    axes.set_ylim(lowest - margin, highest + 2 * margin)
    axes.set_xlabel("t0")
    axes.set_title("1, 5  nats per token")
    axes.legend(loc="upper left")
