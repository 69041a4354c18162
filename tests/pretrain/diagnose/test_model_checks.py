"""The measurements: each on inputs whose answer is known."""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from data_pipeline.reading.batch import PREFIX, SUFFIX, Batch
from modeling.attention import Segments
from modeling.floors import Floors
from modeling.likelihood import DocumentNats
from pretrain.diagnose import model_checks
from pretrain.stages.dit import FlowErrors
from tests.data_pipeline.made_batches import ROW_TOKENS, make_batch


@dataclass
class StubStage:
    """A stage whose error is 0.1 t + `reads_context` times the distance of the context shown to the window's own."""

    reads_context: float

    def latents(self, batch: Batch) -> Tensor:
        return torch.randn(ROW_TOKENS, 3, generator=torch.Generator().manual_seed(int(batch.row_keys_B[0])))

    def heldout_flow(self, batch: Batch, latents_TZ: Tensor, context_TZ: Tensor, quarter: int) -> FlowErrors:
        ids_T = Segments.from_lengths(batch.window_lengths).ids_T
        time_T = ((batch.window_uniforms_W2[:, 0] + quarter) / 4).float()[ids_T]
        distance_T = ((latents_TZ - context_TZ) ** 2).sum(-1) * (batch.roles_T == PREFIX)
        distance_W = torch.zeros(len(batch.window_lengths)).index_add(0, ids_T, distance_T)
        floors = Floors(torch.tensor([0.5, 1.5]), 0.1)
        error_T = 0.1 * time_T + self.reads_context * distance_W[ids_T]
        return FlowErrors(error_T, (batch.roles_T == SUFFIX).float(), time_T, floors)


BATCHES = [make_batch([(5, 9), (8, 4), (3, 20)], seed=1), make_batch([(10, 10), (0, 6), (7, 30)], seed=2)]


def test_exchanged_contexts_come_from_the_next_window_and_targets_stay() -> None:
    batch = make_batch([(5, 9), (0, 6), (8, 4), (3, 20)])
    latents_TZ = torch.arange(ROW_TOKENS, dtype=torch.float32)[:, None].repeat(1, 2)
    exchanged_T = model_checks.exchange_contexts(batch, latents_TZ)[:, 0].long()
    roles_T = batch.roles_T
    assert torch.equal(exchanged_T[roles_T != PREFIX], torch.arange(ROW_TOKENS)[roles_T != PREFIX])
    window_T = Segments.from_lengths(batch.window_lengths).ids_T
    sources_T = window_T[exchanged_T[roles_T == PREFIX]]
    assert sources_T.tolist() == [2] * 5 + [3] * 8 + [0] * 3  # the next window with a context, and round
    assert bool((roles_T[exchanged_T[roles_T == PREFIX]] == PREFIX).all())
    assert exchanged_T[20:28].tolist() == [32, 33, 34, 32, 33, 34, 32, 33]  # a shorter context is repeated


def test_the_only_context_is_exchanged_with_itself() -> None:
    batch = make_batch([(5, 9), (0, 6)])
    latents_TZ = torch.randn(ROW_TOKENS, 2)
    assert torch.equal(model_checks.exchange_contexts(batch, latents_TZ), latents_TZ)


def test_context_gap_is_zero_for_a_stage_that_ignores_context_and_positive_for_one_that_reads_it() -> None:
    deaf = model_checks.flow_figures(StubStage(0.0), BATCHES)  # type: ignore[arg-type]
    assert deaf.context_gap == [0.0] * 4
    assert deaf.context_gap_error == [0.0] * 4
    reading = model_checks.flow_figures(StubStage(1.0), BATCHES)  # type: ignore[arg-type]
    assert reading.losses == pytest.approx(deaf.losses)
    assert all(gap > 0 for gap in reading.context_gap)
    assert all(error > 0 for error in reading.context_gap_error)


def test_floors_removed_is_one_minus_loss_over_floor() -> None:
    floors = {"blind": [2.0, 1.0], "covariance": [1.0, 0.5]}
    removed = model_checks.floors_removed([0.5, 1.0], floors)
    assert removed == {"blind": [0.75, 0.0], "covariance": [0.5, -1.0]}
    figures = model_checks.flow_figures(StubStage(0.0), BATCHES)  # type: ignore[arg-type]
    for quarter, loss in enumerate(figures.losses):
        assert 0.1 * quarter / 4 <= loss <= 0.1 * (quarter + 1) / 4  # every window at a time of its quarter
        blind, covariance = (figures.floors[name][quarter] for name in ("blind", "covariance"))
        assert 1.2 < blind < 2 > blind > covariance
        assert figures.floors_removed["covariance"][quarter] == pytest.approx(1 - loss / covariance)


@dataclass
class LikelyStage(StubStage):
    """Whose bound is 2 nats a token at t0 = 0.3, less at 0.6, 1 with its tokens' times spread, and more by what its context lies away."""

    time_spread: float = 0.0

    @property
    def config(self) -> SimpleNamespace:
        return SimpleNamespace(flow=SimpleNamespace(time_spread=self.time_spread))

    def document_nats(
        self, batch: Batch, times: tuple[float, ...] = (), context_TZ: Tensor | None = None
    ) -> DocumentNats:
        lengths = [n for n, role in zip(batch.segment_lengths, batch.segment_roles) if role == SUFFIX]
        tokens_N = torch.tensor(lengths)
        away = 0.0 if context_TZ is None else float((context_TZ - self.latents(batch)).abs().mean())
        nats_NG = tokens_N[:, None] * torch.tensor([2.0, 1.5, 3.0], dtype=torch.float64) + self.reads_context * away
        return DocumentNats((0.3, 0.6, 1.0), torch.zeros_like(nats_NG), nats_NG, tokens_N)

    def spread_nats(self, batch: Batch, t0: float, context_TZ: Tensor | None = None) -> DocumentNats:
        nats_N1 = self.document_nats(batch, (), context_TZ).cross_entropies_NG[:, 1:2]
        tokens_N = self.document_nats(batch).tokens_N
        return DocumentNats((t0,), torch.zeros_like(nats_N1), nats_N1 - 0.5 * tokens_N[:, None], tokens_N)


def test_nats_are_those_of_all_windows_and_the_contexts_worth_is_a_paired_difference() -> None:
    batches = [*BATCHES, make_batch([])]
    deaf = model_checks.nats_figures(LikelyStage(0.0), batches)  # type: ignore[arg-type]
    assert (deaf.bound.nats, deaf.bound.t0) == pytest.approx((1.5, 0.6))
    assert deaf.bound.tokens == sum(batch.num_tokens(SUFFIX) for batch in batches)
    assert deaf.context_worth == pytest.approx((0.0, 0.0))
    reading = model_checks.nats_figures(LikelyStage(1.0), batches)  # type: ignore[arg-type]
    assert reading.bound.nats == pytest.approx(1.5)
    worth, error = reading.context_worth
    assert worth > 0
    assert 0 < error < worth


def test_a_model_that_was_trained_with_times_spread_is_measured_so_at_a_t0_that_other_batches_chose() -> None:
    batches = [*BATCHES, make_batch([])]
    together = model_checks.nats_figures(LikelyStage(1.0), batches)  # type: ignore[arg-type]
    spread = model_checks.nats_figures(LikelyStage(1.0, time_spread=1.5), batches)  # type: ignore[arg-type]
    assert (spread.bound.nats, spread.bound.t0) == pytest.approx((1.0, 0.6))
    assert (spread.bound.tokens, spread.bound.documents) == (together.bound.tokens, together.bound.documents)
    assert spread.context_worth == pytest.approx(together.context_worth)
    assert spread.together.tokens_N.tolist() == together.together.tokens_N.tolist()


def test_flow_figures_skip_batches_without_targets() -> None:
    with_filler = model_checks.flow_figures(StubStage(1.0), [*BATCHES, make_batch([])])  # type: ignore[arg-type]
    assert with_filler.losses == model_checks.flow_figures(StubStage(1.0), BATCHES).losses  # type: ignore[arg-type]


def test_standard_error_of_batch_means() -> None:
    sums = [{"flow_q1": (value * 10.0, 10.0)} for value in (1.0, 2.0, 3.0)]
    assert model_checks._standard_error(sums, None, "flow_q1") == pytest.approx(math.sqrt(2) / 3)
    assert model_checks._standard_error(sums, sums, "flow_q1") == 0
    assert math.isnan(model_checks._standard_error(sums[:1], None, "flow_q1"))


def test_losses_are_sorted_by_the_targets_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "MIN_LENGTH_TOKENS", 16)
    figures = model_checks.flow_figures(StubStage(0.0), BATCHES)  # type: ignore[arg-type]
    assert {edge: count for edge, (_, count) in figures.by_length.items()} == {16: 4 * 29, 32: 4 * 50}
    assert list(figures.loss_by_length) == ["<= 16", "<= 32"]
    tokens = {edge: count / 4 for edge, (_, count) in figures.by_length.items()}
    total = sum(figures.loss_by_length[f"<= {edge}"] * count for edge, count in tokens.items())
    assert total / sum(tokens.values()) == pytest.approx(sum(figures.losses) / 4, rel=1e-5)
    monkeypatch.setattr(model_checks, "MIN_LENGTH_TOKENS", 40)
    assert list(figures.loss_by_length) == ["<= 32"]


def test_posterior_noise_is_the_ratio_of_the_variances() -> None:
    generator = torch.Generator().manual_seed(0)
    means_MZ = torch.randn(20_000, 3, generator=generator) * torch.tensor([1.0, 2.0, 1e-4])
    posterior = model_checks.Posterior(means_MZ, torch.full((20_000, 3), 0.25), torch.zeros(20_000, dtype=torch.int64))
    noise = posterior.noise()
    assert noise["posterior_noise_per_channel"][:2] == pytest.approx([0.25, 0.0625], rel=0.05)
    assert noise["dead_channels"] == 1
    assert noise["posterior_noise_share"] == pytest.approx((0.2 + 0.0588 + 1) / 3, abs=0.01)
    assert noise["posterior_noise_median"] == pytest.approx(0.25, rel=0.05)


def test_without_posterior_noise_the_oracle_removes_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    means_MZ = torch.randn(1000, 2, generator=generator)
    posterior = model_checks.Posterior(means_MZ, torch.zeros(1000, 2), torch.zeros(1000, dtype=torch.int64))
    assert posterior.noise()["oracle_floor"] == pytest.approx([0.0] * 4, abs=1e-9)


class NearestVAE:
    """Latents are one-hot vectors of the tokens; decoding takes the largest channel."""

    def encode(self, tokens_T: Tensor, segments: Segments) -> tuple[Tensor, Tensor, None]:
        return torch.eye(20)[tokens_T], torch.zeros(len(tokens_T), 20), None

    def standardize(self, latents_TZ: Tensor) -> Tensor:
        return latents_TZ

    def decode_tokens(self, latents_TZ: Tensor, segments: Segments) -> Tensor:
        return latents_TZ.argmax(-1)


def test_the_decoder_basin_starts_at_the_accuracy_without_noise_and_falls() -> None:
    accuracies = model_checks.decoder_basin(NearestVAE(), BATCHES)  # type: ignore[arg-type]
    assert accuracies[0] == 1.0
    assert accuracies[1] == 1.0  # noise of 0.1 is ten deviations away from a wrong token's one
    assert accuracies[-1] < 0.5
    assert 0.2 < model_checks.basin_radius(accuracies) < 0.5


@pytest.mark.parametrize(
    ("accuracies", "radius"),
    [
        ([1.0, 1.0, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1], 0.15),
        ([1.0] * 8, 1.0),
        ([0.89] + [0.5] * 7, 0.0),
        ([math.nan] * 8, 0.0),
    ],
)
def test_basin_radius(accuracies: list[float], radius: float) -> None:
    assert model_checks.basin_radius(accuracies) == pytest.approx(radius)
