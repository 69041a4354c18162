"""A new run that starts from another one's weights (`train.init_from`): they are its first, in the same latent space."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import train
from pretrain.checkpoint.find import checkpoint_of
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.config.load import load_config
from pretrain.stages.latent_statistics import LATENTS_NAME, LatentStatistics
from tests.pretrain import tiny_pipeline, tiny_run
from tests.pretrain.conftest import Trained


def values(trained: Trained, folder: Path, **changes: Any) -> dict:
    """Of a new run on other text, whose steps move nothing."""
    data = tiny_pipeline.write_data(folder / "data", seed=1)
    found = tiny_pipeline.dit_values(data, trained.vae, folder / "run", init_from=str(trained.dit), checkpoint_every=1)
    found["optimizer"] |= {"lr": 1e-30, "weight_decay": 0.0}
    found["train"] |= changes
    return found


def differ(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(some[name], others[name]) for name in some)


def test_its_first_weights_are_the_others_averaged_ones_and_it_stays_in_their_latent_space(
    trained: Trained, tmp_path: Path
) -> None:
    run = tiny_pipeline.start(tmp_path, values(trained, tmp_path))
    before = read_tensors(trained.dit, "ema")
    for state in ("weight", "ema"):
        found = read_tensors(run, state)
        assert found.keys() == before.keys()
        assert not differ(found, before)
    assert differ(read_tensors(trained.dit, "weight"), before)
    assert read_manifest(checkpoint_of(run)).step == 2
    statistics = LatentStatistics.load(run / LATENTS_NAME)
    assert torch.equal(statistics.mean_Z, before["latents_mean"])
    assert torch.equal(statistics.std_Z, before["latents_std"])
    # A resumed run goes on from its own checkpoint.
    resumed = values(trained, tmp_path / "again") | {"train": values(trained, tmp_path / "more")["train"]}
    resumed["data"]["path"] = str(tmp_path / "data")
    resumed["train"] |= {"run": str(run), "steps": 3}
    resumed["optimizer"] |= {"lr": 0.1}
    config = tiny_run.write_config(tmp_path / "resumed.json", resumed)
    assert train.main(["--config", str(config), "--allow-change", "optimizer.lr", "--allow-change", "train.steps"]) == 0
    assert read_manifest(checkpoint_of(run)).step == 3
    assert differ(read_tensors(run, "weight"), before)


def test_what_does_not_fit_is_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, said in (
        (trained.vae, "is a run of stage vae; expected one of stage dit"),
        (tmp_path / "absent", "neither a checkpoint"),
    ):
        folder = tmp_path / Path(source).name
        config = tiny_run.write_config(tmp_path / "c.json", values(trained, folder, init_from=str(source)))
        assert train.main(["--config", str(config)]) == 2
        assert said in capsys.readouterr().err
        assert load_config(str(config), []).train.init_from == str(source)
