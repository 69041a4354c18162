"""What a stage computes, beside the loss's value: the noise that it draws by key."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from data_pipeline.reading.counts import token_counts
from modeling.attention import Segments
from modeling.layers import Block
from modeling.text_vae import TextVAE
from modeling.token_statistics import unigram_nats
from pretrain.config.load import load_config
from pretrain.stages.build import build_stage, measure
from pretrain.stages.dit import HELDOUT_SPREAD, HELDOUT_TIMES, DiTStage
from pretrain.stages.frozen_vae import ENCODER, posterior
from pretrain.stages.rows import heldout_rows
from tests.pretrain import tiny_pipeline
from tests.pretrain.conftest import Trained


def built(values: dict, folder: Path) -> tuple[DiTStage, Batch]:
    """The stage of a configuration, and held-out rows."""
    (folder / "c.json").write_text(json.dumps(values))
    config = load_config(str(folder / "c.json"), [])
    manifest, cpu = Manifest.load(config.data.path), torch.device("cpu")
    measure(config, manifest, cpu)
    stage = build_stage(config, manifest, cpu)
    assert isinstance(stage, DiTStage)
    return stage, next(iter(heldout_rows(config, 8)))


def test_latents_drawn_from_the_posterior_tell_nothing_of_the_flows_noise(trained, tmp_path: Path) -> None:
    """A context that held the noise of a target beside it would give away a part of what is to be predicted."""
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run")
    values["flow"]["target"] = "sample"
    stage, batch = built(values, tmp_path)
    vae = stage.vae
    mean_TZ, log_variance_TZ, *_ = vae.encode(batch.tokens_T, Segments.from_lengths(batch.segment_lengths))
    drawn_TZ = stage.train().latents(batch) * vae.latents_std + vae.latents_mean
    posterior_TZ = (drawn_TZ - mean_TZ) / (0.5 * log_variance_TZ).exp()
    time_W = torch.ones(len(batch.window_lengths))
    keep_W = torch.ones_like(time_W, dtype=torch.bool)
    noise_TZ = stage._noised(batch, mean_TZ, mean_TZ, time_W, keep_W)[-1]
    assert 0.9 < float(posterior_TZ.detach().std()) < 1.1
    # No token's draw is another token's noise.
    assert float(torch.cdist(posterior_TZ.detach(), noise_TZ).min()) > 1e-2


@pytest.mark.parametrize("head", ["velocity", "categorical"])
def test_the_bound_of_a_batch_is_of_its_windows_with_targets(trained, tmp_path: Path, head: str) -> None:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run", {"head": head})
    values["flow"]["token_loss_weight"] = 1.0
    stage, batch = built(values, tmp_path)
    stage.eval()
    found = stage.document_nats(batch, (0.3, 0.6, 1.0))
    lengths = [n for n, role in zip(batch.segment_lengths, batch.segment_roles) if role == SUFFIX]
    assert found.tokens_N.tolist() == lengths
    assert torch.equal(found.bounds_NG, stage.document_nats(batch, (0.3, 0.6, 1.0)).bounds_NG)
    foreign_TZ = stage.latents(batch).roll(7, 0)
    with_foreign = stage.document_nats(batch, (0.3, 0.6, 1.0), foreign_TZ)
    with torch.no_grad():
        for p in stage.parameters():
            if not p.any():
                p.normal_(std=0.3)
    changed = stage.document_nats(batch, (0.3, 0.6, 1.0))
    assert not torch.isclose(changed.bounds_NG, found.bounds_NG).any()
    assert not torch.isclose(
        stage.document_nats(batch, (0.3, 0.6, 1.0), foreign_TZ).bounds_NG[:, 0], changed.bounds_NG[:, 0]
    ).all()
    # From the tokens' means, where the head knows them; else from the encoder's latents.
    is_target_T1, latents_TZ = (batch.roles_T == SUFFIX)[:, None], stage.latents(batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "latents", lambda _: latents_TZ + 0.5 * is_target_T1)
        from_others = stage.document_nats(batch, (0.3, 0.6, 1.0))
    assert torch.equal(from_others.bounds_NG, changed.bounds_NG) == (head == "categorical")
    if head == "categorical":  # an untrained network says nothing: the sample's frequencies, whatever the context
        assert torch.equal(with_foreign.bounds_NG, found.bounds_NG)
        counts_V = token_counts(str(trained.data), Manifest.load(trained.data))
        expected = unigram_nats(counts_V, batch.tokens_T[batch.roles_T == SUFFIX])
        assert found.curve[-1] == pytest.approx(expected, rel=1e-4)
        told = stage.summarised({name: float(x[0] / x[1]) for name, x in stage(batch, {"targets": 1}).metrics.items()})
        assert told["unigram_nats"] == pytest.approx(expected, rel=1e-4)
        assert told["nats"] == pytest.approx(min(stage.document_nats(batch, HELDOUT_TIMES).curve[:-2]), rel=1e-4)
        assert f"{told['nats_t0']:.2f}" in {f"{t:.2f}" for t in HELDOUT_TIMES}
        assert not any(name.startswith("nats_at") for name in told)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_held_out_rows_are_measured_along_the_paths_of_training(trained, tmp_path: Path, spread: float) -> None:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run", {"head": "categorical"})
    values["flow"] |= {"token_loss_weight": 1.0, "time_spread": spread}
    stage, batch = built(values, tmp_path)
    stage.eval()
    with torch.no_grad():
        for p in stage.parameters():  # else it knows no time
            if not p.any():
                p.normal_(std=0.3)
    sums = stage(batch, {"targets": 1}).metrics
    targets = int((batch.roles_T == SUFFIX).sum())
    found = {name: float(x[0]) / targets for name, x in sums.items() if name.startswith("nats_at")}
    common = stage.document_nats(batch, HELDOUT_TIMES).curve[:-2]
    times, levels = HELDOUT_SPREAD
    apart = [stage.spread_nats(batch, t0, num_levels=levels).curve[0] for t0 in times]
    assert list(found.values()) == pytest.approx(apart if spread else common, rel=1e-4)
    assert list(found) == [f"nats_at_{t0:.2f}" for t0 in (times if spread else HELDOUT_TIMES[:-2])]
    assert not spread or apart != pytest.approx(common[:3], rel=1e-4)
    best = min(found, key=lambda name: found[name])
    assert stage.summarised(found) == {"nats": found[best], "nats_t0": float(best[-4:])}


def test_a_categorical_head_that_nothing_would_train_is_refused(trained, tmp_path: Path) -> None:
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run", {"head": "categorical"})
    with pytest.raises(
        UserError, match=r"nothing would train the categorical head's logits: set flow\.token_loss_weight=1"
    ):
        built(values, tmp_path)


ENCODER_ERROR = 0.01
"""Of the posterior means' root mean square error in bf16, over their deviation."""


@pytest.mark.parametrize("target", ["mean", "sample"])
def test_the_frozen_encoder_trains_in_bf16_and_compiled_once_a_micro_batch(
    trained: Trained, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(Block, "compile", lambda block, **options: compiled.append(block))
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run", precision="bf16", compile=True)
    values["flow"]["target"] = target
    stage, batch = built(values, tmp_path)
    exact_TZ = posterior(stage.vae, batch)[0]
    error = (posterior(stage.encoder, batch)[0] - exact_TZ).square().mean().sqrt() / exact_TZ.std()
    assert 0 < error < ENCODER_ERROR
    weights = [p for name, p in stage.encoder.named_parameters() if name.startswith(ENCODER)]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    assert set(stage.encoder.encoder.blocks) <= set(compiled)
    assert not any(name.startswith("encoder") for name, _ in stage.named_parameters())  # DeepSpeed does not see it
    calls: list[TextVAE] = []
    encode = TextVAE.encode
    monkeypatch.setattr(TextVAE, "encode", lambda vae, *given: (calls.append(vae), encode(vae, *given))[1])
    stage.train()(batch, {"targets": 1})
    assert calls == [stage.encoder]
    # Evaluation and diagnosis keep to the weights as they are.
    assert torch.equal(stage.eval().latents(batch), stage.vae.standardize(exact_TZ))


def test_in_fp32_the_encoder_shares_the_vaes_weights(trained: Trained, tmp_path: Path) -> None:
    stage, batch = built(tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run"), tmp_path)
    assert stage.encoder.embedding.weight.data_ptr() == stage.vae.embedding.weight.data_ptr()
    assert torch.equal(stage.train().latents(batch), stage.eval().latents(batch))
