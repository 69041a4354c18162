"""A VAE alone: an AutoModel folder, and stage 2's `model.vae`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from modeling.attention import Segments
from modeling.textvae import TextVAEModel
from pretrain.checkpoint.read import read_tensors
from pretrain.diagnose import __main__ as diagnose
from pretrain.export.convert import convert, main
from pretrain.stages import exported as exported_folders
from pretrain.stages.frozen_vae import load_vae
from pretrain.stages.inputs import vae_fingerprint
from tests.pretrain import tiny_pipeline
from tests.pretrain.conftest import Trained
from tests.pretrain.export import bare

OUTSIDE = """
    import sys

    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
    inputs = tokenizer(["w3 w4 w5", "w9"], padding=True, return_tensors="pt")
    print(model.decode(model(**inputs).latents, inputs["attention_mask"]).tolist())
"""


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported VAE. Read only."""
    return convert(trained.vae, tmp_path_factory.mktemp("vae") / "vae-1.0")


def test_its_latents_are_the_runs(trained: Trained, folder: Path) -> None:
    run, model = load_vae(trained.vae), TextVAEModel.from_pretrained(folder)
    rows, mask = torch.tensor([[3, 4, 5], [0, 0, 9]]), torch.tensor([[1, 1, 1], [0, 0, 1]])
    found = model(rows, mask)
    for row, text in ((0, [3, 4, 5]), (1, [9])):
        mean_TZ, log_variance_TZ, _ = run.encode(torch.tensor(text), Segments.from_lengths([len(text)]))
        assert torch.allclose(found.latents[row][mask[row].bool()], mean_TZ, atol=1e-6)
        assert torch.allclose(found.log_variance[row][mask[row].bool()], log_variance_TZ, atol=1e-6)
    assert not found.latents[1, :2].any()
    expected = run.decode_tokens(found.latents[0], Segments.from_lengths([3]))
    assert torch.equal(model.decode(found.latents, mask)[0], expected)
    assert model.decode(found.latents, mask)[1, :2].tolist() == [0, 0]
    assert model(rows[:, :0]).latents.shape == (2, 0, 4)


def test_last_weights_in_half_precision(trained: Trained, tmp_path: Path) -> None:
    assert (
        main(["--run", str(trained.vae), "--output", str(tmp_path / "x"), "--weights", "raw", "--dtype", "bf16"]) == 0
    )
    weights, saved = load_file(tmp_path / "x" / "model.safetensors"), read_tensors(trained.vae, "weight")
    assert all(torch.equal(weights[name], saved[name].to(weights[name].dtype)) for name in weights)
    assert weights["vae.to_mean.weight"].dtype == torch.bfloat16


def test_stage_two_takes_it_and_is_exported_with_it(trained: Trained, folder: Path, tmp_path: Path) -> None:
    values = tiny_pipeline.dit_values(trained.data, folder, tmp_path / "dit")
    run = tiny_pipeline.start(tmp_path, values)
    ours, theirs = (read_tensors(place, "ema") for place in (run, trained.dit))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    weights = load_file(convert(run, tmp_path / "x") / "model.safetensors")
    vae = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], vae[name]) for name in vae if "latents_" not in name)
    changed = Path(shutil.copytree(folder, tmp_path / "other"))
    vae["vae.to_mean.bias"] += 1
    save_file(vae, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was trained with a VAE of fingerprint .*, that in .*other has"):
        convert(run, tmp_path / "y", vae=str(changed))


@pytest.mark.slow
def test_a_dit_that_was_trained_on_it_is_diagnosed(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = convert(trained.vae, tmp_path / "vae")
    run = tiny_pipeline.start(tmp_path, tiny_pipeline.dit_values(trained.data, folder, tmp_path / "dit"))
    # Its diagnosis finds the same as that of the DiT on the VAE's run, which is the same VAE.
    quick = [
        "--rows",
        "4",
        "--num-steps",
        "2",
        "--set",
        "diagnose.sample_tokens=64",
        "--set",
        "diagnose.sweep_scales=[1]",
    ]
    figures = []
    for number, place in enumerate((run, trained.dit)):
        output = tmp_path / f"diagnosis{number}"
        assert diagnose.main(["--run", str(place), "--output", str(output), "--device", "cpu", *quick]) in (0, 1)
        figures.append(json.loads((output / "diagnosis.json").read_text()))
    for name in ("nats_per_token", "posterior_noise_share", "basin_radius", "context_gap", "latent_rms"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.1 if name == "posterior_noise_share" else 1e-5)
    assert figures[0]["vae_token_accuracy"] > 0
    weights = load_file(folder / "model.safetensors")
    weights["vae.to_mean.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert diagnose.main(["--run", str(run), "--output", str(tmp_path / "z"), "--device", "cpu", *quick]) == 2
    assert "model.vae of the run's configuration is" in capsys.readouterr().err


def test_the_hubs_is_fetched(trained: Trained, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        if repo_id != "me/vae":
            raise OSError("404")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(exported_folders, "use_hub", lambda: None)
    vae = load_vae("hf://me/vae", Manifest.load(trained.data))
    assert torch.equal(vae.to_mean.weight, load_vae(folder).to_mean.weight)
    assert vae_fingerprint("hf://me/vae") == vae_fingerprint(folder)
    files = [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "model-*.safetensors",
        "tokenizer.json",
    ]
    assert asked == [("me/vae", files)] * len(asked) != []
    with pytest.raises(UserError, match=r"--set model\.vae=hf://me/none cannot be fetched from the hub"):
        vae_fingerprint("hf://me/none")


def test_mistakes(trained: Trained, folder: Path, exported: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "x"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"tokenizer_sha256": "f" * 64}))
    with pytest.raises(UserError, match="was trained with tokenizer ffff"):
        load_vae(other, Manifest.load(trained.data))
    (other / "config.json").write_text(json.dumps(config | {"vae": config["vae"] | {"width": 48}}))
    with pytest.raises(UserError, match="does not fit the model"):
        load_vae(other)
    (other / "config.json").write_text(json.dumps(config | {"vae": {"widht": 4}}))
    with pytest.raises(UserError, match="is not what textldm convert writes of a VAE"):
        load_vae(other)
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="is not what textldm convert writes of a VAE"):
        load_vae(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_vae(other)
    with pytest.raises(UserError, match="holds a model of type textldm; expected the export of a stage-1 run"):
        load_vae(exported)


@pytest.mark.slow
def test_it_needs_nothing_of_our_repository(folder: Path, tmp_path: Path) -> None:
    printed = bare.run(OUTSIDE, folder, folder=tmp_path)
    model = TextVAEModel.from_pretrained(folder)
    (whole,) = model.decode(model(torch.tensor([[3, 4, 5]])).latents).tolist()
    (alone,) = model.decode(model(torch.tensor([[9]])).latents).tolist()
    assert json.loads(printed.splitlines()[-1]) == [whole, [0, 0, *alone]]
