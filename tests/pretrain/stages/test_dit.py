"""What a stage computes, beside the loss's value: the noise that it draws by key."""

import json
from pathlib import Path

import torch

from data_pipeline.format.manifest import Manifest
from modeling.attention import Segments
from pretrain.config.load import load_config
from pretrain.stages.build import build_stage, measure
from pretrain.stages.dit import DiTStage
from pretrain.stages.rows import heldout_rows
from tests.pretrain import tiny_pipeline


def test_latents_drawn_from_the_posterior_tell_nothing_of_the_flows_noise(trained, tmp_path: Path) -> None:
    """A context that held the noise of a target beside it would give away a part of what is to be predicted."""
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "run")
    values["flow"]["target"] = "sample"
    (tmp_path / "c.json").write_text(json.dumps(values))
    config = load_config(str(tmp_path / "c.json"), [])
    manifest, cpu = Manifest.load(trained.data), torch.device("cpu")
    measure(config, manifest, cpu)
    stage = build_stage(config, manifest, cpu)
    assert isinstance(stage, DiTStage)
    batch = next(iter(heldout_rows(config, 8)))
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
