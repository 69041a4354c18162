"""The measurements behind `textldm diagnose`: figures that tell a healthy run from a dead one (docs/diagnosis.md).

Every function takes a model with its weights loaded, in eval mode, and batches on its device; nothing here is random but what row
keys fix. What is asked of generated text (checks 7 to 9): text_checks.py.

Shape letters: T packed tokens, M real tokens of several batches, Z latent dim.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX, Batch
from modeling import flow
from modeling.attention import Segments
from modeling.floors import NAMES as FLOOR_NAMES
from modeling.floors import Floors, measure_floors
from modeling.likelihood import LAST_T0, Bound, DocumentNats, least_bound, per_token, together
from modeling.text_vae import TextVAE
from pretrain.diagnose.side_by_side import each
from pretrain.stages.base import Stage, row_noise
from pretrain.stages.dit import HELDOUT_TIMES, QUARTERS, DiTStage
from pretrain.stages.latent_statistics import MIN_STD
from pretrain.telemetry.metrics import MetricSums

NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
BASIN_ACCURACY = 0.9
TIMES = (0.05, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
LENGTH_EDGES = (16, 32, 64, 128, 256, 512, 1024)
MIN_LENGTH_TOKENS = 64
"""Fewer target tokens than this say nothing about a length."""
# Averages of 0/1 over tokens: this many give them to half a percent or one.
BASIN_TOKENS, ESTIMATE_TOKENS = 8192, 4096

Sums = dict[str, tuple[float, float]]
Tick = Callable[[], None]


def _no_tick() -> None:
    """Default of the progress callbacks, which are called once a batch."""


def heldout_metrics(stage: Stage, batches: Sequence[Batch], tick: Tick = _no_tick) -> dict[str, float]:
    """What the stage tells of the batches."""
    return heldout_metrics_with_errors(stage, batches, tick)[0]


def heldout_metrics_with_errors(
    stage: Stage, batches: Sequence[Batch], tick: Tick = _no_tick
) -> tuple[dict[str, float], dict[str, float]]:
    """What the stage tells of the batches, and the metrics' standard errors over batches; nan of a single one."""

    def told(batch: Batch) -> MetricSums:
        counts = {name: max(count, 1) for name, count in stage.token_counts(batch).items()}
        own = MetricSums()
        own.add(stage(batch, counts).metrics)
        return own

    sums, parts = MetricSums(), list[Sums]()
    for own in each(told, batches, tick=tick):
        sums.merge(own)
        parts.append({name: (total, weight) for name, (total, weight) in own.totals().items()})
    means = {name: total / weight for name, (total, weight) in sums.totals().items() if weight}
    return stage.summarised(means), {name: _standard_error(parts, None, name) for name in means}


@dataclass(frozen=True)
class Posterior:
    """The VAE's posteriors of all real tokens, on the CPU: means, variances [M, Z] and tokens [M]."""

    means_MZ: Tensor
    variances_MZ: Tensor
    tokens_M: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, vae: TextVAE, batches: Sequence[Batch]) -> "Posterior":
        """Posteriors of the batches' tokens, every segment encoded by itself."""
        means, variances, tokens = [], [], []
        for batch in batches:
            segments = Segments.from_lengths(batch.segment_lengths, batch.tokens_T.device)
            real_T = batch.roles_T.cpu() != FILLER
            mean_TZ, log_variance_TZ, _ = vae.encode(batch.tokens_T, segments)
            means.append(mean_TZ.float().cpu()[real_T])
            variances.append(log_variance_TZ.float().exp().cpu()[real_T])
            tokens.append(batch.tokens_T.cpu()[real_T])
        return cls(torch.cat(means), torch.cat(variances), torch.cat(tokens))

    def standardise(self, vae: TextVAE) -> None:
        """Set the statistics of a VAE that no stage 2 has measured yet."""
        vae.latents_mean.copy_(self.means_MZ.double().mean(0))
        vae.latents_std.copy_(self.means_MZ.double().std(0).clamp_min(MIN_STD))

    def noise(self) -> dict[str, Any]:
        """Check 2: s = E[sigma^2] / Var(mu) per channel, and the least flow loss per quarter that a model of *samples* can have.

        Whoever knows the mean exactly still has to guess the sample's own noise, of variance s in units of the mean's.
        """
        ratio_Z = self.variances_MZ.double().mean(0) / self.means_MZ.double().var(0).clamp_min(1e-12)
        quarters = ((torch.arange(32, dtype=torch.float64) + 0.5) / 32).view(QUARTERS, -1)
        return {
            "posterior_noise_per_channel": ratio_Z.tolist(),
            "posterior_noise_median": ratio_Z.median().item(),
            # Not the mean of s, which one dead channel (Var(mu) near 0) makes anything.
            "posterior_noise_share": (ratio_Z / (1 + ratio_Z)).mean().item(),
            "dead_channels": int((ratio_Z > 10).sum()),
            "oracle_floor": [flow.covariance_floor(times, ratio_Z).mean().item() for times in quarters],
        }

    def floors(self) -> Floors:
        """Check 1 for a VAE: the floors of its latents, each channel with mean 0 and variance 1."""
        means_MZ = self.means_MZ.double()
        standardised_MZ = (means_MZ - means_MZ.mean(0)) / means_MZ.std(0).clamp_min(MIN_STD)
        return measure_floors(standardised_MZ, self.tokens_M)


def by_quarter(floors: Floors) -> dict[str, list[float]]:
    """Each floor's mean over each quarter of t: name -> four numbers."""
    times_G = (torch.arange(32, dtype=torch.float64) + 0.5) / 32
    return {name: values_G.view(QUARTERS, -1).mean(1).tolist() for name, values_G in floors.at(times_G).items()}


def decoder_basin(vae: TextVAE, batches: Sequence[Batch], tick: Tick = _no_tick) -> list[float]:
    """Check 3: token accuracy after Gaussian noise of each of `NOISE_LEVELS` on the standardised latents."""

    def right(batch: Batch) -> list[int]:
        segments = Segments.from_lengths(batch.segment_lengths, batch.tokens_T.device)
        real_T = batch.roles_T != FILLER
        latents_TZ = vae.standardize(vae.encode(batch.tokens_T, segments)[0])
        noise_TZ = row_noise(batch, latents_TZ.shape[1])
        decoded = (vae.decode_tokens(latents_TZ + level * noise_TZ, segments) for level in NOISE_LEVELS)
        return [int(((tokens_T == batch.tokens_T) & real_T).sum()) for tokens_T in decoded]

    chosen = first_tokens(batches, BASIN_TOKENS)
    total = max(sum(int((batch.roles_T != FILLER).sum()) for batch in chosen), 1)
    return [sum(counts) / total for counts in zip(*each(right, chosen, tick=tick))]


def basin_radius(accuracies: Sequence[float], accuracy: float = BASIN_ACCURACY) -> float:
    """The noise level at which the accuracy falls below `accuracy`, linear between `NOISE_LEVELS`; 0 if it is never reached."""
    if not accuracies[0] >= accuracy:
        return 0.0
    for i in range(1, len(accuracies)):
        if accuracies[i] < accuracy:
            share = (accuracies[i - 1] - accuracy) / (accuracies[i - 1] - accuracies[i])
            return NOISE_LEVELS[i - 1] + share * (NOISE_LEVELS[i] - NOISE_LEVELS[i - 1])
    return NOISE_LEVELS[-1]


def estimate_accuracy(
    stage: DiTStage, batches: Sequence[Batch], tick: Tick = _no_tick
) -> tuple[list[float], list[float]]:
    """Check 3: share of target tokens that decode correctly from the one-step estimate of z at each of `TIMES`, and the shares'
    standard errors over batches.
    """

    def right(batch: Batch) -> Sums:
        counts: dict[str, float] = {}
        for time in TIMES:
            estimate_TZ, is_target_T = stage.one_step_estimate(batch, time)
            segments = Segments.from_lengths(batch.segment_lengths, estimate_TZ.device)
            decoded_T = stage.vae.decode_tokens(estimate_TZ, segments)
            counts[str(time)] = float(((decoded_T == batch.tokens_T) & is_target_T).sum())
        return {name: (count, float(batch.num_tokens(SUFFIX))) for name, count in counts.items()}

    parts = each(right, first_tokens(batches, ESTIMATE_TOKENS), tick=tick)
    names = [str(time) for time in TIMES]
    total = sum(batch[names[0]][1] for batch in parts)
    shares = [sum(batch[name][0] for batch in parts) / max(total, 1) for name in names]
    return shares, [_standard_error(parts, None, name) for name in names]


def first_tokens(batches: Sequence[Batch], max_tokens: int) -> list[Batch]:
    """The first batches, until they hold `max_tokens` real tokens."""
    chosen, tokens = [], 0
    for batch in batches:
        if tokens < max_tokens:
            chosen.append(batch)
            tokens += batch.num_tokens(PREFIX, SUFFIX)
    return chosen


@dataclass(frozen=True)
class FlowFigures:
    """Flow loss of each batch as (sum, weight) by name, with true and with foreign contexts, at the same times and noise.

    Names are those of `stages.FlowErrors.metrics`; by_length: (sum, weight) by the upper edge of the target's length.
    """

    true: list[Sums]
    foreign: list[Sums]
    by_length: dict[int, tuple[float, float]]

    @cached_property
    def losses(self) -> list[float]:
        """Flow loss with true contexts, by quarter of t."""
        return [_mean(self.true, f"flow_q{q + 1}") for q in range(QUARTERS)]

    @property
    def loss_error(self) -> float:
        """Standard error over batches of the mean of the four."""
        names = [f"flow_q{q + 1}" for q in range(QUARTERS)]
        both = [{"flow": tuple(sum(part[name][i] for name in names) for i in (0, 1))} for part in self.true]
        return _standard_error(both, None, "flow")  # type: ignore[arg-type]

    @cached_property
    def foreign_losses(self) -> list[float]:
        """Flow loss with another document's contexts, by quarter of t."""
        return [_mean(self.foreign, f"flow_q{q + 1}") for q in range(QUARTERS)]

    @cached_property
    def floors(self) -> dict[str, list[float]]:
        """Check 1: what predictors without language reach, per quarter, at the same times."""
        return {name: [_mean(self.true, f"{name}_floor_q{q + 1}") for q in range(QUARTERS)] for name in FLOOR_NAMES}

    @property
    def floors_removed(self) -> dict[str, list[float]]:
        """Check 1: the fraction of each floor that the model has removed."""
        return floors_removed(self.losses, self.floors)

    @property
    def context_gap(self) -> list[float]:
        """Check 5: flow loss with another document's context minus with the true one, per quarter."""
        return [foreign - true for foreign, true in zip(self.foreign_losses, self.losses)]

    @property
    def context_gap_error(self) -> list[float]:
        """Standard error of the gaps over batches."""
        return [_standard_error(self.foreign, self.true, f"flow_q{q + 1}") for q in range(QUARTERS)]

    @property
    def loss_by_length(self) -> dict[str, float]:
        """Check 6: flow loss, mean of the four quarters, by the target's length in tokens."""
        found = sorted(self.by_length.items())
        return {f"<= {edge}": total / count for edge, (total, count) in found if count >= QUARTERS * MIN_LENGTH_TOKENS}


def flow_figures(
    stage: DiTStage, batches: Sequence[Batch], tick: Tick = _no_tick, with_foreign: bool = True
) -> FlowFigures:
    """Measure the flow loss of all batches, every window once in each quarter of t, with its own and with a foreign context.

    with_foreign: else with its own alone, for half the time; the gaps are not there then.
    """

    def measured(batch: Batch) -> tuple[Sums, Sums, dict[int, tuple[float, float]]]:
        latents_TZ = stage.latents(batch)
        own = [stage.heldout_flow(batch, latents_TZ, latents_TZ, quarter) for quarter in range(QUARTERS)]
        by_length: dict[int, tuple[float, float]] = {}
        for errors in own:
            _add_by_length(by_length, batch, errors.error_T.cpu())
        if not with_foreign:
            return _summed([errors.metrics() for errors in own]), {}, by_length
        foreign_TZ = exchange_contexts(batch, latents_TZ)
        others = [stage.heldout_flow(batch, latents_TZ, foreign_TZ, quarter) for quarter in range(QUARTERS)]
        true, foreign = (_summed([errors.metrics() for errors in found]) for found in (own, others))
        return true, foreign, by_length

    found = each(measured, [batch for batch in batches if batch.num_tokens(SUFFIX)], tick=tick)
    sums: dict[int, tuple[float, float]] = {}
    for _, _, by_length in found:
        for edge, (total, count) in by_length.items():
            sums[edge] = (sums.get(edge, (0.0, 0.0))[0] + total, sums.get(edge, (0.0, 0.0))[1] + count)
    return FlowFigures([true for true, _, _ in found], [foreign for _, foreign, _ in found if foreign], sums)


@dataclass(frozen=True)
class NatsFigures:
    """The bound on the likelihood of the held-out windows, with true and with foreign contexts, at the same times and noise."""

    together: DocumentNats
    """With one time for all tokens of a window, true contexts, at every t0."""
    bound: Bound
    """Check 1."""
    context_worth: tuple[float, float]
    """Check 5: nats a token that another document's context costs, at the t0 of the true ones, and the standard error."""


def nats_figures(stage: DiTStage, batches: Sequence[Batch], tick: Tick = _no_tick) -> NatsFigures:
    """Measure the bound of all windows with a target, as the model was trained: with tokens' times together, or spread."""
    batches = [batch for batch in batches if batch.num_tokens(SUFFIX)]
    is_spread = stage.config.flow.time_spread and len(batches) > 1
    return (_nats_at_spread_times if is_spread else _nats_at_common_times)(stage, batches, tick)


def _nats_at_common_times(stage: DiTStage, batches: Sequence[Batch], tick: Tick) -> NatsFigures:
    """One path has every t0 on it."""

    def measured(batch: Batch) -> tuple[DocumentNats, DocumentNats]:
        foreign_TZ = exchange_contexts(batch, stage.latents(batch))
        return stage.document_nats(batch), stage.document_nats(batch, context_TZ=foreign_TZ)

    joined, others = (DocumentNats.joined(parts) for parts in zip(*each(measured, batches, tick=tick)))
    gaps_N = (others.bounds_NG - joined.bounds_NG)[:, joined.best]
    return NatsFigures(joined, least_bound(joined), per_token(gaps_N, joined.tokens_N))


def _nats_at_spread_times(stage: DiTStage, batches: Sequence[Batch], tick: Tick) -> NatsFigures:
    """Every t0 is a path of its own: batches of even numbers take the one that is best for the odd ones at common times, and conversely."""
    common = each(lambda batch: stage.document_nats(batch, HELDOUT_TIMES), batches, tick=_no_tick)
    halves = [DocumentNats.joined(common[other::2]) for other in (1, 0)]
    t0s = [min(half.times[half.best], LAST_T0) for half in halves]

    def measured(batch: Batch, t0: float) -> tuple[DocumentNats, DocumentNats]:
        foreign_TZ = exchange_contexts(batch, stage.latents(batch))
        return stage.spread_nats(batch, t0), stage.spread_nats(batch, t0, foreign_TZ)

    found = each(measured, batches, [t0s[number % 2] for number in range(len(batches))], tick=tick)
    gaps_N = torch.cat([(foreign.bounds_NG - true.bounds_NG)[:, 0] for true, foreign in found])
    worth = per_token(gaps_N, torch.cat([true.tokens_N for true, _ in found]))
    return NatsFigures(DocumentNats.joined(common), together([(true, 0) for true, _ in found]), worth)


def floors_removed(losses: Sequence[float], floors: dict[str, list[float]]) -> dict[str, list[float]]:
    """1 - loss / floor for each floor and quarter."""
    return {name: [1 - loss / floor for loss, floor in zip(losses, values)] for name, values in floors.items()}


def exchange_contexts(batch: Batch, latents_TZ: Tensor) -> Tensor:
    """Latents with each window's context replaced by that of the next window that has one, repeated or cut to its length."""
    starts = torch.tensor([0, *batch.segment_lengths]).cumsum(0).tolist()
    segments = zip(starts, batch.segment_lengths, batch.segment_roles)
    places = [(start, length) for start, length, role in segments if role == PREFIX]
    exchanged_TZ = latents_TZ.clone()
    for (start, length), (source, available) in zip(places, places[1:] + places[:1]):
        index = torch.arange(length, device=latents_TZ.device) % available + source
        exchanged_TZ[start : start + length] = latents_TZ[index]
    return exchanged_TZ


def _add_by_length(sums: dict[int, tuple[float, float]], batch: Batch, error_T: Tensor) -> None:
    """Add the errors of a batch's targets under the smallest edge that is not below the target's length."""
    errors = error_T.double().split(batch.segment_lengths)
    for error, length, role in zip(errors, batch.segment_lengths, batch.segment_roles):
        if role == SUFFIX:
            edge = next((edge for edge in LENGTH_EDGES if length <= edge), 2 ** math.ceil(math.log2(length)))
            total, count = sums.get(edge, (0.0, 0.0))
            sums[edge] = (total + float(error.sum()), count + length)


def _summed(parts: Sequence[dict[str, Tensor]]) -> Sums:
    totals = {name: torch.stack([part[name] for part in parts]).double().sum(0).tolist() for name in parts[0]}
    return {name: (total, weight) for name, (total, weight) in totals.items()}


def _mean(sums: Sequence[Sums], name: str) -> float:
    total, weight = (sum(part[name][i] for part in sums) for i in (0, 1))
    return total / weight if weight else math.nan


def _standard_error(sums: Sequence[Sums], minus: Sequence[Sums] | None, name: str) -> float:
    """Standard error over batches of a metric's weighted mean; with `minus`, of its difference from that one, batch by batch."""
    mean = _mean(sums, name) - (_mean(minus, name) if minus else 0.0)
    total, variance = 0.0, 0.0
    for i, part in enumerate(sums):
        value, weight = part[name]
        value -= minus[i][name][0] if minus else 0.0
        total += weight
        variance += (value - weight * mean) ** 2
    return math.sqrt(variance) / total if total and len(sums) > 1 else math.nan
