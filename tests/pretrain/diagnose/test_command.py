"""The diagnosis of runs in miniature, end to end; thresholds decide the exit code; an old verdict never outlives a failure."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from data_pipeline.text.tokenization import train_tokenizer
from pretrain import train
from pretrain.checkpoint.manifest import _digest
from pretrain.checkpoint.read import read_tensors
from pretrain.config.load import load_config
from pretrain.config.registry import StageKind
from pretrain.config.sections import Diagnose
from pretrain.diagnose import __main__ as diagnose
from pretrain.diagnose import model_checks
from pretrain.diagnose.diagnosis import Diagnosis
from pretrain.diagnose.dit import judge
from pretrain.diagnose.verdicts import Verdict, at_most, table
from pretrain.runs.folder import config_of
from pretrain.stages.dit_config import DiTRun
from tests.pretrain import tiny_run

QUICK = ["--rows", "4", "--num-steps", "2", "--set", "diagnose.sample_tokens=64", "--set", "diagnose.sweep_scales=[1]"]
load = StageKind.load
LENIENT = [
    f"--set=diagnose.{key}" for key in ("min_token_accuracy=0", "min_basin_radius=0", "max_posterior_noise_share=1")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a VAE of two steps and a DiT of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    data = tiny_run.write_data(folder / "data")
    tokenizer = train_tokenizer(["A B C"], 257)  # ids below 64 are the printable characters up to "_"
    tokenizer.save(data / "tokenizer")
    tiny_run.say_tokenizer(data, tokenizer.info)
    vae = tiny_run.config_values(data, folder / "vae", steps=2, eval_every=0)
    vae["data"]["split"] = {"kind": "truncate"}
    dit = tiny_run.config_values(data, folder / "dit", steps=2, eval_every=0) | {"stage": "dit"}
    del dit["repa"]
    dit["model"] = {"vae": str(folder / "vae"), "latent_dim": 4, "width": 32, "num_layers": 1, "head_dim": 16}
    dit["data"]["split"] = {"kind": "context", "min_tokens": 2}
    dit["flow"] = {"statistics_rows": 8}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for name, values in (("vae", vae), ("dit", dit)):
            config = tiny_run.write_config(folder / f"{name}.json", values)
            assert train.main(["--config", str(config)]) == 0
    return folder


def diagnosed(run: Path, output: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and diagnosis.json."""
    code = diagnose.main(["--run", str(run), "--output", str(output), "--device", "cpu", *QUICK, *arguments])
    return code, json.loads((output / "diagnosis.json").read_text())


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is most of a small diagnosis's time."""
    monkeypatch.setattr(diagnose, "draw", lambda *_: None)


def test_a_vae_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, record = diagnosed(runs / "vae", tmp_path)
    assert code == 1
    assert record["verdict"] == "no-go"
    assert "NO-GO" in capsys.readouterr().out
    assert 0 <= record["vae_token_accuracy"] < 0.5
    assert record["repa_cosine_excess"] is None  # no teacher
    assert record["step"] == 2
    assert len(record["blind_floor"]) == 4
    assert imread(tmp_path / "diagnosis.png").shape[1] > 1000
    code, record = diagnosed(runs / "vae", tmp_path, *LENIENT)
    assert (code, record["verdict"]) == (0, "go")
    assert capsys.readouterr().out.strip().endswith("thresholds met")


@pytest.mark.parametrize("verdicts", [[], [at_most(1, "something", None, 2.0)]])
def test_a_diagnosis_that_measured_nothing_is_no_go_ahead(
    verdicts: list[Verdict],
    runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one without panels has a page of the table alone."""
    bare = Diagnosis(lambda *_: {}, lambda *_: verdicts)
    monkeypatch.setattr(StageKind, "load", lambda self, field: bare if field == "diagnosis" else load(self, field))
    code, record = diagnosed(runs / "vae", tmp_path)
    assert (code, record["verdict"]) == (2, "not measured")
    assert "NOT MEASURED" in capsys.readouterr().out
    assert imread(tmp_path / "diagnosis.png").shape[1] > 1000


def test_a_dit_run_has_what_the_recipes_summary_needs(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (runs / "dit").rglob("*")}
    code, record = diagnosed(runs / "dit", tmp_path)
    assert code == 1
    for name in ("blind_floor_removed", "covariance_floor_removed", "context_gap"):
        assert len(record[name]) == 4
        assert all(isinstance(value, float) for value in record[name])
    assert 0 <= record["vae_token_accuracy"] <= 1
    assert 0 <= record["real_word_share"] <= 1
    assert record["guidance_sweep"][0]["guidance_scale"] == 1
    checks = [line["check"] for line in record["checks"]]
    assert checks == sorted(checks)
    assert set(checks) == set(range(1, 10))
    assert imread(tmp_path / "diagnosis.png").shape[1] > 1000
    assert before == {path: path.stat().st_mtime_ns for path in (runs / "dit").rglob("*")}  # nothing else is touched
    monkeypatch.setattr(diagnose, "draw", lambda *_: None)
    again = diagnosed(runs / "dit", tmp_path)[1]
    del record["seconds"], again["seconds"]
    assert again == record


@pytest.mark.usefixtures("no_page")
def test_a_moved_run_is_diagnosed_where_it_is(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "dit", tmp_path / "elsewhere")
    assert diagnose.main(["--run", str(tmp_path / "elsewhere"), *QUICK]) == 1
    assert (tmp_path / "elsewhere" / "diagnosis.json").exists()


def test_the_ema_weights_are_measured(runs: Path) -> None:
    config = config_of(runs / "vae", [])
    path = diagnose.checkpoint_of(runs / "vae")
    stage = diagnose.load_stage(config, path, torch.device("cpu"))
    ema = read_tensors(path, "ema")
    weights = read_tensors(path, "weight")
    assert torch.equal(stage.state_dict()["vae.lm_head.weight"], ema["vae.lm_head.weight"])
    assert not torch.equal(ema["vae.lm_head.weight"], weights["vae.lm_head.weight"])


def test_users_mistakes(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose.main(["--run", str(tmp_path / "nothing")]) == 2
    assert "config.json" in capsys.readouterr().err
    shutil.copytree(runs / "dit", tmp_path / "dit")
    (tmp_path / "dit" / "diagnosis.json").write_text('{"verdict": "go"}')
    assert diagnose.main(["--run", str(tmp_path / "dit"), "--set", "model.vae=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "dit" / "diagnosis.json").exists()
    assert diagnose.main(["--run", str(tmp_path / "dit"), "--set", "diagnose.row=3"]) == 2
    assert "diagnose.rows" in capsys.readouterr().err


def test_what_could_not_be_measured_is_no_verdict(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--run", str(runs / "vae"), "--output", str(tmp_path)]
    assert diagnose.main([*command, "--device", "gpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device is gpu (")
    assert error.count("\n") == 1

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model_checks, "heldout_metrics", out_of_memory)
    assert diagnose.main([*command, "--device", "cpu"]) == 2
    assert "OutOfMemoryError: CUDA out of memory" in capsys.readouterr().err
    assert not (tmp_path / "diagnosis.json").exists()


@pytest.mark.usefixtures("no_page")
def test_another_latent_space_than_the_runs_own_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "vae", tmp_path / "vae")
    assert (
        train.main(["--config", str(runs / "vae.json"), "--run", str(tmp_path / "other"), "--set", "train.steps=1"])
        == 0
    )
    latents = (runs / "dit" / "latents.safetensors").read_bytes()
    code = diagnose.main(["--run", str(runs / "dit"), "--set", f"model.vae={tmp_path / 'other'}", *QUICK])
    assert code == 2
    assert "another VAE" in capsys.readouterr().err
    assert (runs / "dit" / "latents.safetensors").read_bytes() == latents
    # A copy of the same VAE is the same latent space.
    code, _ = diagnosed(runs / "dit", tmp_path / "out", "--set", f"model.vae={tmp_path / 'vae'}")
    assert code == 1


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("data", "path", r"data\.path of the run's configuration is .*whose fingerprint is"),
        ("model", "vae", r"model\.vae of the run's configuration is .*whose fingerprint is"),
        (
            "data",
            "",
            "what a run names is not fetched: if you know that place, add --set data.path=http://127.0.0.1:1/x",
        ),
    ],
)
def test_attack_1c_what_a_downloaded_run_names_is_not_read(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str, key: str, said: str
) -> None:
    """Somebody else's configuration says which of this machine's folders are opened, and which servers asked."""
    shutil.copytree(runs / "dit", tmp_path / "dit")
    values = json.loads((tmp_path / "dit" / "config.json").read_text())
    if key == "path":
        values["data"]["path"] = str(tiny_run.write_data(tmp_path / "private", seed=7))
    elif key == "vae":
        shutil.copytree(runs / "vae", tmp_path / "private")
        for saved in (tmp_path / "private" / "checkpoints").glob("step-*"):
            manifest = json.loads((saved / "manifest.json").read_text())
            del manifest["sha256"]
            for file in manifest["files"].values():
                file["header"]["sha256"] = "0" * 64
            (saved / "manifest.json").write_text(json.dumps(manifest | {"sha256": _digest(manifest)}))
        values["model"]["vae"] = str(tmp_path / "private")
    else:
        values["data"]["path"] = "http://127.0.0.1:1/x"
    (tmp_path / "dit" / "config.json").write_text(json.dumps(values))
    assert diagnose.main(["--run", str(tmp_path / "dit"), *QUICK]) == 2
    assert re.search(said, capsys.readouterr().err)


HEALTHY = {
    "posterior_noise_share": 0.2, "dead_channels": 0, "vae_token_accuracy": 0.999, "basin_radius": 0.5,
    "repa_cosine_excess": 0.3, "flow_loss": [0.5, 0.5, 1.0, 1.0], "blind_floor_removed": [0.5] * 4,
    "covariance_floor_removed": [0.4] * 4, "nats_per_token": 4.5, "nats_per_token_error": 0.1, "unigram_nats": 5.8,
    "context_nats": 0.2, "context_nats_error": 0.05,
    "estimate_accuracy": [0.99], "context_gap": [0.01, 0.02, 0.03, -0.001], "context_gap_error": [0.001] * 4,
    "loss_by_target_length": {"<= 16": 0.9},
    "generalisation_gap": 0.01, "guidance_scale": 7.0, "latent_rms": 1.0, "distinct_2_ratio": 0.9, "entropy_ratio": 1.0,
    "guidance_sweep": [], "real_word_share": 0.95, "copied_share": 0.02, "true_copied_share": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def config() -> DiTRun:
    loaded = load_config("dit_b")
    assert isinstance(loaded, DiTRun)
    loaded.diagnose = Diagnose()
    return loaded


def test_a_healthy_run_passes_every_threshold(config: DiTRun) -> None:
    verdicts = judge(HEALTHY, config)
    assert not [verdict for verdict in verdicts if verdict.passed is False]
    thresholds = [name for name in Diagnose.model_fields if name.startswith(("min_", "max_"))]
    assert sum(verdict.passed is True for verdict in verdicts) == len(thresholds) + 2  # those in nats need no threshold


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("posterior_noise_share", 0.9),
        ("vae_token_accuracy", 0.98),
        ("basin_radius", 0.1),
        ("repa_cosine_excess", 0.05),
        ("nats_per_token", 5.7),
        ("nats_per_token", float("nan")),
        ("context_nats", 0.08),
        ("estimate_accuracy", [0.5]),
        ("loss_by_target_length", {"<= 16": 0.7, "<= 32": 2.0}),
        ("generalisation_gap", 0.3),
        ("latent_rms", float("nan")),
        ("distinct_2_ratio", 0.1),
        ("entropy_ratio", 0.5),
        ("real_word_share", 0.4),
        ("copied_share", 0.5),
    ],
)
def test_each_bad_figure_alone_is_no_go(name: str, value: Any, config: DiTRun) -> None:
    failed = [verdict for verdict in judge(HEALTHY | {name: value}, config) if verdict.passed is False]
    assert len(failed) == 1


def test_what_cannot_be_measured_is_said_and_fails_nothing(config: DiTRun) -> None:
    figures = {name: value for name, value in HEALTHY.items() if name not in ("latent_rms", "real_word_share")}
    figures |= {"repa_cosine_excess": None, "loss_by_target_length": {}}
    verdicts = judge(figures, config)
    assert not [verdict for verdict in verdicts if verdict.passed is False]
    assert "not measured" in table(verdicts)


def test_the_table_is_aligned(config: DiTRun) -> None:
    header, _, *lines, _ = table(judge(HEALTHY, config)).splitlines()
    place = header.index("verdict")
    assert all(line[place:] in ("", "ok", "FAIL") for line in lines)


def test_numbers_that_json_lacks_become_null() -> None:
    assert diagnose.finite({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}
