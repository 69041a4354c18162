"""An export is whole, needs nothing of this repository, and says the same as the model it was made from."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Batch
from modeling.attention import Segments
from modeling.guidance import GuidedVelocity
from modeling.solvers import integrate
from modeling.textldm import TextLDM
from modeling.textldm import __file__ as textldm_source
from modeling.times import TimeDistribution
from pretrain import train
from pretrain.checkpoint.find import newest_complete
from pretrain.checkpoint.manifest import read_manifest
from pretrain.checkpoint.read import read_tensors
from pretrain.config.load import load_config
from pretrain.config.sections import Diagnose
from pretrain.export.convert import convert, is_export, main
from pretrain.export.parts import Sampling, modeling_files
from pretrain.stages.build import build_stage
from pretrain.stages.dit import DiTStage
from pretrain.stages.rows import heldout_rows
from tests.pretrain import tiny_pipeline
from tests.pretrain.conftest import Trained
from tests.pretrain.export import bare

PROMPTS, NEW_TOKENS, NUM_STEPS, SCALE = [[3, 4, 5, 6, 7], [9, 8]], 12, 8, 3.0

OUTSIDE = """
    import json, pickle, sys

    for name in ("modeling", "pretrain", "data_pipeline", "deepspeed"):
        sys.modules[name] = None  # it must not be needed
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder, noise_file = sys.argv[1:]
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    given = torch.load(noise_file)
    tokens = model.generate(given["prompts"], given["new"], given["steps"], given["scale"], noise=given["noise"], eos_token_id=-1)
    with open("model.pickle", "wb") as file:
        pickle.dump(model, file)
    print(json.dumps({
        "tokens": [ids.tolist() for ids in tokens],
        "text": tokenizer.decode([3, 4]),
        "steps": AutoConfig.from_pretrained(folder, trust_remote_code=True).num_steps,
        "path": sys.path,
    }))
"""


READ = """
    import pickle, sys

    with open("model.pickle", "rb") as file:
        model = pickle.load(file)
    assert "modeling" not in sys.modules
    print([ids.tolist() for ids in model.generate([3, 4], 5, 2, seed=2**64 - 1)])
"""
"""By a process that has imported nothing: one of Ray's, or of multiprocessing's spawn."""


def noise() -> list[torch.Tensor]:
    """One [new tokens, Z] tensor a prompt."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(NEW_TOKENS, 4, generator=generator) for _ in PROMPTS]


def training_side(trained: Trained) -> list[list[int]]:
    """Tokens from the stage's own models with EMA weights and the sampler, written out prompt by prompt."""
    stage = build_stage(load_config(trained.dit / "config.json"), Manifest.load(trained.data), torch.device("cpu"))
    assert isinstance(stage, DiTStage)
    stage.load_state_dict(read_tensors(trained.dit, "ema"))
    found = []
    with torch.no_grad():
        for ids, eps_TZ in zip(PROMPTS, noise()):
            context_TZ = stage.vae.encode(torch.tensor(ids), Segments.from_lengths([len(ids)]))[0]
            context_TZ = (context_TZ - stage.latents_mean) / stage.latents_std
            latents_TZ = torch.cat((context_TZ, torch.zeros_like(eps_TZ)))
            is_target_T = torch.arange(len(latents_TZ)) >= len(ids)
            windows = Segments.from_lengths([len(latents_TZ)])
            velocity = GuidedVelocity(stage.dit.eval(), latents_TZ, is_target_T, windows, SCALE)
            start_TZ = torch.cat((torch.zeros_like(context_TZ), eps_TZ))
            z_TZ = integrate(velocity, start_TZ, stage.times.grid(NUM_STEPS).tolist())
            tokens_T = stage.vae.decode_tokens(z_TZ[len(ids) :], Segments.from_lengths([NEW_TOKENS]))
            found.append(tokens_T.tolist())
    return found


def test_time_spread_gives_target_tokens_times_of_their_own_in_training_alone(trained: Trained) -> None:
    config = load_config(trained.dit / "config.json", ["flow.time_spread=1.5"])
    stage = build_stage(config, Manifest.load(trained.data), torch.device("cpu"))
    assert isinstance(stage, DiTStage)
    batches = list(heldout_rows(stage.config, 32))

    def times(batch: Batch) -> torch.Tensor:
        latents_TZ, time_W = stage.latents(batch), torch.full_like(batch.window_uniforms_W2[:, 0], 0.7)
        with torch.no_grad():
            errors = stage.flow_errors(batch, latents_TZ, latents_TZ, time_W, torch.ones_like(time_W, dtype=torch.bool))
        return errors.time_T[errors.weights_T > 0]

    assert torch.equal(times(batches[0]), times(batches[0]))  # keyed, not drawn
    logits_T = torch.logit(torch.cat([times(batch) for batch in batches]).double())
    offsets_T = logits_T - torch.logit(torch.tensor(0.7, dtype=torch.float64))
    assert len(offsets_T) > 100
    assert abs(float(offsets_T.mean())) < 4 * 1.5 / len(offsets_T) ** 0.5
    assert 1.2 < float(offsets_T.std()) < 1.8
    stage.eval()
    assert (times(batches[0]) == torch.tensor(0.7)).all()


def test_an_export_alone_gives_the_training_sides_tokens(trained: Trained, exported: Path, tmp_path: Path) -> None:
    given = {"prompts": PROMPTS, "new": NEW_TOKENS, "steps": NUM_STEPS, "scale": SCALE, "noise": noise()}
    torch.save(given, tmp_path / "noise.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-I",
        "-c",
        bare.NO_GARBAGE + textwrap.dedent(OUTSIDE),
        str(exported),
        str(tmp_path / "noise.pt"),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    command = [sys.executable, "-I", "-c", bare.NO_GARBAGE + textwrap.dedent(READ)]
    read = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert read.returncode == 0, read.stderr
    alone = TextLDM.from_pretrained(exported).generate([[3, 4]], 5, 2, seed=2**64 - 1)
    assert json.loads(read.stdout) == [ids.tolist() for ids in alone]
    assert str(Path(textldm_source).parents[1]) not in found["path"]
    expected = training_side(trained)
    assert len({token for ids in expected for token in ids}) > 3  # else any model would agree
    assert found["tokens"] == expected
    assert (found["text"], found["steps"]) == ("w3 w4", 50)


def test_a_categorical_head_travels_with_its_statistics(trained: Trained, tmp_path: Path) -> None:
    model = {"head": "categorical", "neighbour_heads": True}
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "categorical", model)
    values["flow"]["token_loss_weight"] = 1.0
    dit = tiny_pipeline.start(tmp_path, values)
    saved = read_tensors(dit, "ema")
    frequencies_V = saved["dit.head.log_frequencies"].exp()
    assert float(frequencies_V.sum()) == pytest.approx(1, abs=1e-4)
    assert len(set(frequencies_V.tolist())) > 5  # fitted, not the initial zeros
    exported = TextLDM.from_pretrained(convert(dit, tmp_path / "export"))
    tokens = exported.generate(PROMPTS, NEW_TOKENS, NUM_STEPS, SCALE, noise=noise(), eos_token_id=-1)
    assert [ids.tolist() for ids in tokens] == training_side(trained._replace(dit=dit))


def test_the_folder_holds_what_its_parts_were(trained: Trained, exported: Path) -> None:
    names = {path.name for path in exported.iterdir()}
    stems = (
        "attention",
        "beyond_window",
        "continuation",
        "conventions",
        "flow",
        "heads",
        "shapes",
        "guidance",
        "layers",
        "likelihood",
        "losses",
        "pretrained",
        "prompts",
        "shapes",
        "solvers",
        "text_dit",
        "text_vae",
        "textldm",
        "times",
    )
    code = {f"{stem}.py" for stem in stems}
    assert names == code | {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path.name for path in modeling_files("textldm.py")} == code
    weights = load_file(exported / "model.safetensors")
    ema, last = (read_tensors(trained.dit, state) for state in ("ema", "weight"))
    stage_one = read_tensors(trained.vae, "ema")
    for name, tensor in weights.items():
        if name.startswith("vae.latents_"):
            assert torch.equal(tensor, ema[name.removeprefix("vae.")])
            assert tensor.std() > 0
        else:
            assert torch.equal(tensor, (ema if name.startswith("dit.") else stage_one)[name])
    assert any(not torch.equal(weights[name], last[name]) for name in weights if name.startswith("dit."))
    config = json.loads((exported / "config.json").read_text())
    manifest = Manifest.load(trained.data)
    assert (config["max_window"], config["eos_token_id"]) == (manifest.max_window, manifest.tokenizer.eos_id)
    assert TimeDistribution(**config["times"]).std == 1.2
    assert [config[name] for name in ("num_steps", "guidance_scale", "token_temperature", "solver")] == [
        50,
        7.0,
        1.0,
        "euler",
    ]
    card = (exported / "README.md").read_text()
    assert manifest.fingerprint in card
    assert "license: apache-2.0" in card
    assert str(trained.data) not in card


def test_generate_does_by_default_what_the_diagnosis_did() -> None:
    diagnose = Diagnose(num_steps=9, guidance_scale=3.0, token_temperature=2.0, solver="multistep")
    expected = {"num_steps": 9, "guidance_scale": 1.0, "token_temperature": 2.0, "solver": "multistep"}
    assert Sampling(guidance_scale=1.0).settings(diagnose) == expected


def test_the_even_grid_is_the_one_that_the_diagnosis_measured(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "dit"
    shutil.copytree(trained.dit, run)
    (run / "diagnosis.json").write_text(json.dumps({"even_times": [1.0, 0.8, 0.7, 0.0], "nats_t0": 0.43}))
    assert main(["--run", str(run), "--output", str(tmp_path / "export")]) == 0
    seen: list[float] = []
    model = TextLDM.from_pretrained(tmp_path / "export")
    assert model.config.likelihood_t0 == 0.43
    model.generate(PROMPTS, NEW_TOKENS, 6, grid="even", on_step=lambda step, t, tokens: seen.append(t))
    assert seen == pytest.approx([1.0, 0.9, 0.8, 0.75, 0.7, 0.35])


@pytest.mark.parametrize(
    "found", ['{"even_times": [1.0, 0.2, 0.6, 0.0]}', '{"even_times": 3}', '{"nats_t0": "late"}', "[]", '{"even_ti']
)
def test_a_diagnosis_that_is_none_is_one_message(
    trained: Trained, tmp_path: Path, found: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "dit"
    shutil.copytree(trained.dit, run)
    (run / "diagnosis.json").write_text(found)
    assert main(["--run", str(run), "--output", str(tmp_path / "export")]) == 2
    assert f"{run / 'diagnosis.json'} is not what textldm diagnose writes" in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_options_reach_the_folder(trained: Trained, tmp_path: Path) -> None:
    output = tmp_path / "half"
    flags = ["--weights", "raw", "--dtype", "bf16", "--num-steps", "9", "--guidance-scale", "2", "--solver", "heun"]
    command = ["--run", str(trained.dit), "--output", str(output), "--checkpoint", "2", *flags]
    assert main(command) == 0
    config, weights = json.loads((output / "config.json").read_text()), load_file(output / "model.safetensors")
    assert (config["num_steps"], config["guidance_scale"], config["solver"]) == (9, 2.0, "heun")
    saved = read_tensors(trained.dit, "weight")
    assert torch.equal(weights["dit.from_latent.weight"], saved["dit.from_latent.weight"].bfloat16())
    assert torch.equal(weights["vae.latents_std"], saved["latents_std"])
    model = TextLDM.from_pretrained(output)
    assert (model.dtype, model.vae.latents_std.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(model.vae.latents_std, saved["latents_std"])
    assert len(model.generate(PROMPTS, NEW_TOKENS, eos_token_id=-1)[0]) == NEW_TOKENS


def test_what_stands_at_the_output(trained: Trained, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "x"
    output.mkdir()
    (output / "thesis.txt").write_text("ten years of work")
    command = ["--run", str(trained.dit), "--output", str(output)]
    assert main(command) == 2
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]
    assert main([*command, "--overwrite"]) == 0
    assert (tmp_path / "x.1" / "thesis.txt").read_text() == "ten years of work"
    assert main(command) == 0  # an export as it was written is replaced
    assert {path.name for path in output.iterdir()} == {path.name for path in exported.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x.1"}


def tune(folder: Path) -> None:
    """As `Trainer` leaves it: the export's config, other weights."""
    model = TextLDM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / ".git").mkdir() or (folder / ".git" / "HEAD").write_text("ref: refs/heads/main"),
        lambda folder: (folder / "notes.txt").write_text("mine"),
        lambda folder: (folder / "README.md").write_text("mine"),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace('"num_steps": 50', '"num_steps": 51')
        ),
        tune,
    ],
)
def test_what_was_made_of_an_export_is_never_deleted(trained: Trained, exported: Path, tmp_path: Path, change) -> None:
    output = Path(shutil.copytree(exported, tmp_path / "x"))
    assert is_export(output)
    change(output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert main(["--run", str(trained.dit), "--output", str(output)]) == 2
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def put(place: Any, key: str, value: object) -> None:
    """Set a value in nested dictionaries; sections are parted by two underscores."""
    *sections, last = key.split("__")
    for section in sections:
        place = place[section]
    place[last] = value


def altered(trained: Trained, folder: Path, **changes: object) -> Path:
    """A copy of the DiT's run whose checkpoint says something else in `extra`, and its configuration with it."""
    run = Path(shutil.copytree(trained.dit, folder / "dit"))
    path = newest_complete(run)
    assert path is not None
    saved = read_manifest(path)
    config = {"config": json.loads((run / "config.json").read_text())}
    for key, value in changes.items():
        put(saved.extra, key, value)
        if key.startswith("config__"):
            put(config, key, value)
    saved.save(path)
    (run / "config.json").write_text(json.dumps(config["config"]))
    return run


def test_the_runs_present_configuration_counts(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the data and the VAE are now, and how to sample; a checkpoint without its run goes by its own."""
    run = altered(
        trained, tmp_path, config__data__path="gone", config__model__vae="gone", config__diagnose__num_steps=4
    )
    config = json.loads((run / "config.json").read_text())
    for key, value in (("data__path", str(trained.data)), ("model__vae", str(trained.vae)), ("diagnose__num_steps", 3)):
        put(config, key, value)
    (run / "config.json").write_text(json.dumps(config))
    checkpoint = str(newest_complete(run))
    for number, named in enumerate((str(run), checkpoint)):
        assert main(["--run", named, "--output", str(tmp_path / f"x{number}")]) == 0
        assert json.loads((tmp_path / f"x{number}" / "config.json").read_text())["num_steps"] == 3
    (run / "config.json").unlink()
    assert main(["--run", checkpoint, "--output", str(tmp_path / "y")]) == 2
    assert "gone/manifest.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config__model__vae": "nowhere"}, "where it is now with --vae"),
        ({"config__model__latent_dim": 5}, "does not fit the model"),
        ({"config__model__width": 48}, "does not fit the model"),
        ({"data_fingerprint": "f" * 64}, "trained on data with fingerprint ffff"),
        (
            {"config__data__path": "gone"},
            "gone is no finished folder; if it was moved, say where it is now with --data;",
        ),
    ],
)
def test_mistakes_are_one_message_and_leave_nothing(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, message: str
) -> None:
    run = altered(trained, tmp_path, **changes)
    assert main(["--run", str(run), "--output", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]


def test_a_vae_that_was_trained_on_is_refused_unless_the_checkpoint_of_then_is_named(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = Path(shutil.copytree(trained.vae, tmp_path / "vae"))
    longer = ["--set", "train.steps=3", "--allow-change", "train.steps"]
    assert train.main(["--config", str(vae / "config.json"), "--run", str(vae), *longer]) == 0
    command = ["--run", str(trained.dit), "--output", str(tmp_path / "x"), "--vae"]
    assert main([*command, str(vae)]) == 2
    assert f"that in {vae} has" in (message := capsys.readouterr().err)
    assert "with --vae" in message
    assert not (tmp_path / "x").exists()
    assert main([*command, str(vae / "checkpoints" / "step-000000002")]) == 0


def test_wrong_runs_and_steps(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, extra, message in (
        (tmp_path, [], "is neither a checkpoint"),
        (trained.vae, ["--vae", "x"], "is a run of stage vae, whose export has no flow"),
        (trained.dit, ["--checkpoint", "7"], "no checkpoint of step 7; it has 2"),
        (trained.dit, ["--num-steps", "0"], "--num-steps is 0"),
        (trained.dit, ["--vae", str(trained.dit)], "is a run of stage dit; expected stage vae"),
    ):
        assert main(["--run", str(run), "--output", str(tmp_path / "x"), *extra]) == 2
        assert message in capsys.readouterr().err


def test_another_tokenizer_beside_the_shards(trained: Trained, tmp_path: Path) -> None:
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    definition = json.loads((data / "tokenizer" / "tokenizer.json").read_text())
    definition["model"]["unk_token"] = "w2"
    (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match=r"tokenizer/tokenizer\.json has the sha256 .*, the manifest says"):
        convert(trained.dit, tmp_path / "x", data=str(data))
    (data / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        convert(trained.dit, tmp_path / "x", data=str(data))


def test_moved_folders_can_be_named(trained: Trained, tmp_path: Path) -> None:
    run = altered(trained, tmp_path, config__data__path="gone", config__model__vae="gone")
    output = convert(run, tmp_path / "x", data=str(trained.data), vae=str(trained.vae))
    assert (output / "model.safetensors").is_file()


def test_a_run_in_half_precision_keeps_its_statistics_exact(trained: Trained, tmp_path: Path) -> None:
    """Rounded like the weights, they would shift every latent."""
    values = tiny_pipeline.dit_values(trained.data, trained.vae, tmp_path / "dit", precision="bf16", zero_stage=1)
    run = tiny_pipeline.start(tmp_path, values)
    weights = load_file(convert(run, tmp_path / "x") / "model.safetensors")
    measured = load_file(run / "latents.safetensors")
    for name in ("latents_mean", "latents_std"):
        assert torch.equal(weights[f"vae.{name}"], measured[name])
        assert not torch.equal(measured[name], measured[name].bfloat16().float())


def test_exported_code_is_not_stale(exported: Path) -> None:
    for source in modeling_files("textldm.py"):
        assert (exported / source.name).read_bytes() == source.read_bytes()


def test_a_tiny_pipeline_writes_a_usable_tokenizer(trained: Trained) -> None:
    from data_pipeline.text.tokenization import load_tokenizer

    assert load_tokenizer(trained.data / "tokenizer").info.eos_id == 0
    assert len(tiny_pipeline.WORDS) == Manifest.load(trained.data).tokenizer.vocab_size


def test_neither_command_imports_deepspeed() -> None:
    code = "import sys, pretrain.export.convert, pretrain.export.generate; raise SystemExit('deepspeed' in sys.modules)"
    repository = Path(textldm_source).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=repository, timeout=120, check=False).returncode == 0


def test_it_is_pushed_where_it_is_asked_for(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    from pretrain.export import convert as command

    sent: list[tuple] = []

    class Api:
        def create_repo(self, repo_id: str, **options: object) -> str:
            if repo_id == "not/mine":
                raise PermissionError("403 forbidden")
            sent.append((repo_id, options))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
            sent.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(command, "use_hub", lambda: None)
    output = tmp_path / "x"
    arguments = ["--run", str(trained.dit), "--output", str(output), "--push"]
    assert main([*arguments, "me/textldm-1.0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "https://hub/me/textldm-1.0"
    whole = sorted(path.name for path in output.iterdir())
    assert sent == [("me/textldm-1.0", {"private": True, "exist_ok": True}), ("me/textldm-1.0", whole)]
    assert main([*arguments, "not/mine"]) == 2
    assert "--push not/mine: " in (message := capsys.readouterr().err)
    assert f"403 forbidden; the export itself is whole, in {output}" in message
    shutil.rmtree(output)
    assert main([*arguments, "nobodys"]) == 2
    assert "--push is 'nobodys'" in capsys.readouterr().err
    assert not output.exists()
