"""Distillation: the loss beside a plain float64 loop, what a student starts from, resumes to, and is exported as."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from modeling.attention import Segments
from modeling.heads import Own
from modeling.text_dit import TextDiT
from pretrain import train
from pretrain.checkpoint.read import read_tensors
from pretrain.config.load import load_config
from pretrain.diagnose import __main__ as diagnose
from pretrain.evaluate import __main__ as evaluate
from pretrain.export.convert import convert
from pretrain.export.generate import load_exported
from pretrain.runs.folder import config_of
from pretrain.stages.base import row_noise
from pretrain.stages.build import build_stage, measure, take_first_weights
from pretrain.stages.distill import DistillStage
from pretrain.stages.dit import TIME_NOISE
from pretrain.stages.latent_statistics import statistics_key
from pretrain.stages.outline import Windows, of_distill
from pretrain.stages.rows import heldout_rows
from tests.pretrain import tiny_pipeline, tiny_run
from tests.pretrain.conftest import Trained
from tests.pretrain.evaluate.token_runs import write_texts
from tests.pretrain.serve.running import running

CPU = torch.device("cpu")
TOKENS: dict[str, Any] = {"head": "categorical", "time_conditioning": "additive", "role_embedding": True}
SETTINGS: dict[str, Any] = {"num_steps": 3, "teacher_steps": 2, "guidance_scale": 3.0, "token_temperature": 0.5}


class Teachers(NamedTuple):
    """A trained DiT with each head; the categorical one with times spread over a window's tokens."""

    velocity: Path
    categorical: Path


@pytest.fixture(scope="module")
def teachers(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    folder = tmp_path_factory.mktemp("teachers")
    values = tiny_pipeline.dit_values(trained.data, trained.vae, folder / "tokens", TOKENS)
    values["flow"] |= {"token_loss_weight": 1.0, "time_spread": 1.5}
    return Teachers(trained.dit, tiny_pipeline.start(folder, values))


def student_values(trained: Trained, teachers: Teachers, run: Path, head: str = "categorical", **settings: Any) -> dict:
    """A configuration of stage distill."""
    model = TOKENS if head == "categorical" else {}
    values = tiny_pipeline.dit_values(trained.data, trained.vae, run, model, checkpoint_every=1)
    values |= {"stage": "distill", "distill": {"teacher": str(getattr(teachers, head))} | SETTINGS | settings}
    if head == "categorical":
        values["flow"] |= {"token_loss_weight": 1.0, "time_spread": 1.5}
    elif "token_temperature" not in settings:
        values["distill"]["token_temperature"] = 1.0
    return values


@pytest.fixture(scope="module")
def student(trained: Trained, teachers: Teachers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("student")
    return tiny_pipeline.start(folder, student_values(trained, teachers, folder / "run"))


def built(values: dict, folder: Path, scale: float = 0.0) -> tuple[DistillStage, Batch]:
    """The stage before its first step, and held-out rows; weights of student and teacher moved by noise of `scale`, each by its own."""
    config = load_config(tiny_run.write_config(folder / "c.json", values), [])
    manifest = Manifest.load(config.data.path)
    measure(config, manifest, CPU)
    stage = build_stage(config, manifest, CPU)
    take_first_weights(stage, config, manifest)
    assert isinstance(stage, DistillStage)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (*stage.parameters(), *stage.teacher.dit.parameters()):
            weight.add_(scale * torch.randn_like(weight))
    return stage.train(), next(iter(heldout_rows(config, 8)))


def velocity_of(dit: TextDiT, z_TZ: Tensor, time_T: Tensor, is_target_T: Tensor, temperature: float) -> Tensor:
    """Of one window in float64; of the categorical head by the formulas of docs/models.md."""
    dit, windows = copy.deepcopy(dit).double(), Segments.from_lengths([len(z_TZ)])
    if dit.config.head == "velocity":
        return dit(z_TZ, is_target_T, time_T, windows).velocity_TZ.double()
    head, t = dit.head, (time_T * is_target_T)[:, None]
    means_VZ, within_Z = head.means.double(), head.within_variance.double()
    spread = (1 - t) ** 2 * within_Z + t**2
    known_TV = ((1 - t) * z_TZ / spread) @ means_VZ.T - ((1 - t) ** 2 / (2 * spread)) @ means_VZ.square().T
    known_TV = known_TV + head.log_frequencies.double()
    alone_TZ = known_TV.softmax(-1) @ means_VZ
    alone_TZ = alone_TZ + (1 - t) * within_Z / spread * (z_TZ - (1 - t) * alone_TZ)
    x_TD, condition_TD = dit._conditioned(dit._embedded(z_TZ, Own(alone_TZ), None, is_target_T), t)
    hidden_TD = dit.transformer(x_TD, windows, condition_TD)
    share_TV = ((hidden_TD @ head.to_logits.weight.T + known_TV) / temperature).softmax(-1)
    mean_TZ = share_TV @ means_VZ + within_Z.sqrt() * head.to_shift(hidden_TD)
    return ((t - (1 - t) * within_Z) * z_TZ - t * mean_TZ) / spread


def plain_error(stage: DistillStage, batch: Batch, latents_TZ: Tensor, uniform_W: Tensor) -> Tensor:
    """The loss's sum over the targets, window by window and step by step, in float64."""
    own, flow = stage.config.distill, stage.config.flow
    n, k, g = own.num_steps, own.teacher_steps, own.guidance_scale
    low, high = own.guidance_interval
    noise_TZ = row_noise(batch, latents_TZ.shape[1]).double()
    offset_T = flow.time_spread * row_noise(batch, 1, purpose=TIME_NOISE)[:, 0].double()
    total, start = torch.zeros((), dtype=torch.float64), 0
    deviation = (flow.time_std**2 + flow.time_spread**2) ** 0.5
    for window, length in enumerate(batch.window_lengths):
        part = slice(start, start + length)
        start += length
        is_target_T = batch.roles_T[part] == SUFFIX
        if not is_target_T.any():
            continue
        at = is_target_T[:, None]
        first = min(int(float(uniform_W[window]) * n), n - 1)

        def time(
            index: int, own_T: Tensor = offset_T[part]
        ) -> Tensor:  # of the fine grid, index / (n k) of the way from noise
            share = torch.tensor(1 - index / (n * k), dtype=torch.float64)
            return torch.sigmoid(flow.time_mean + deviation * torch.special.ndtri(share) + own_T)

        t = time(first * k)
        clean_TZ = latents_TZ[part].double()
        z_TZ = torch.where(at, (1 - t)[:, None] * clean_TZ + t[:, None] * noise_TZ[part], clean_TZ)
        begin_TZ, end_TZ = z_TZ, z_TZ
        for index in range(first * k, first * k + k):
            now, after = time(index), time(index + 1)
            conditional_TZ = velocity_of(stage.teacher.dit, end_TZ, now, is_target_T, own.token_temperature)
            unconditional_TZ = velocity_of(stage.teacher.dit, end_TZ * at, now, is_target_T, own.token_temperature)
            inside = ((low <= now) & (now <= high))[:, None]
            guided_TZ = unconditional_TZ + g * (conditional_TZ - unconditional_TZ)
            v_TZ = torch.where(inside, guided_TZ, conditional_TZ)
            end_TZ = torch.where(at, end_TZ + (after - now)[:, None] * v_TZ, end_TZ)
        length_T = t - time(first * k + k)
        student_TZ = begin_TZ - length_T[:, None] * velocity_of(
            stage.dit, begin_TZ, t, is_target_T, own.token_temperature
        )
        total = total + (n * (student_TZ - end_TZ))[is_target_T].square().mean(-1).sum()
    return total


@pytest.mark.parametrize("head", ["velocity", "categorical"])
@pytest.mark.parametrize("interval", [[0.0, 1.0], [0.3, 0.7]])
def test_the_loss_and_its_gradient_are_those_of_a_plain_loop(
    trained: Trained, teachers: Teachers, tmp_path: Path, head: str, interval: list[float]
) -> None:
    values = student_values(trained, teachers, tmp_path / "run", head, guidance_interval=interval)
    stage, batch = built(values, tmp_path, scale=0.1)
    loss = stage(batch, {"targets": 7}).loss
    loss.backward()
    weight = stage.dit.from_latent.weight  # whose gradient is found by differences, too
    assert weight.grad is not None
    latents_TZ = stage.latents(batch)
    direction = weight.grad / weight.grad.norm()
    found = []
    with torch.no_grad():
        for move in (0.0, 1e-3, -1e-3):
            weight.add_(move * direction)
            found.append(float(plain_error(stage, batch, latents_TZ, batch.window_uniforms_W2[:, 0])) / 7)
            weight.sub_(move * direction)
    assert loss.item() == pytest.approx(found[0], rel=2e-5)
    assert float(weight.grad.norm()) == pytest.approx((found[1] - found[2]) / 2e-3, rel=2e-3)


def test_gradients_do_not_depend_on_how_rows_are_cut(trained: Trained, teachers: Teachers, tmp_path: Path) -> None:
    values = student_values(trained, teachers, tmp_path / "run")
    stage, batch = built(values, tmp_path, scale=0.1)
    counts = stage.token_counts(batch)
    stage(batch, counts).loss.backward()
    together = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    stage.zero_grad()
    rows = list(heldout_rows(stage.config, len(batch.row_keys_B), micro_batch_rows=1))
    assert len(rows) == len(batch.row_keys_B)
    for row in rows:
        stage(row, counts).loss.backward()
    for name, p in stage.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, together[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["velocity", "categorical"])
def test_a_student_starts_from_its_teacher_whose_own_step_has_nothing_to_teach(
    trained: Trained, teachers: Teachers, tmp_path: Path, head: str
) -> None:
    same = {"teacher_steps": 1, "guidance_scale": 1.0}
    stage, batch = built(student_values(trained, teachers, tmp_path / "run", head, **same), tmp_path)
    before = read_tensors(getattr(teachers, head), "ema")
    for name, tensor in stage.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(name.startswith("teacher") for name, _ in stage.named_parameters())
    assert stage(batch, {"targets": 1}).loss.item() < 1e-8
    told = stage.eval()(batch, stage.token_counts(batch)).metrics
    assert float(told["distill_teacher"][0]) < 1e-8
    (tmp_path / "guided").mkdir()
    stage, batch = built(student_values(trained, teachers, tmp_path / "guided/run", head), tmp_path / "guided")
    assert stage(batch, {"targets": 1}).loss.item() > 1e-4
    told = stage.eval()(batch, stage.token_counts(batch)).metrics
    assert torch.equal(told["distill"], told["distill_teacher"])  # it is its teacher yet


def test_a_student_learns_what_its_teacher_does_in_more_steps(
    trained: Trained, teachers: Teachers, tmp_path: Path
) -> None:
    stage, batch = built(student_values(trained, teachers, tmp_path / "run"), tmp_path)
    optimizer = torch.optim.Adam(stage.parameters(), lr=3e-3)
    for _ in range(320):
        optimizer.zero_grad()
        stage(batch, stage.token_counts(batch)).loss.backward()
        optimizer.step()
    told = stage.eval()(batch, stage.token_counts(batch)).metrics
    means = stage.summarised({name: float(pair[0] / pair[1]) for name, pair in told.items()})
    assert means["distilled"] > 0.3
    assert means["distilled"] == pytest.approx(1 - means["distill"] / means["distill_teacher"])


def test_a_resumed_run_goes_on_bit_for_bit(trained: Trained, teachers: Teachers, student: Path, tmp_path: Path) -> None:
    values = student_values(trained, teachers, tmp_path / "run")
    values["train"] |= {"steps": 1}
    run = tiny_pipeline.start(tmp_path, values)
    values["train"] |= {"steps": 2}
    config = tiny_run.write_config(tmp_path / "more.json", values)
    assert train.main(["--config", str(config), "--allow-change", "train.steps"]) == 0
    for state in ("weight", "ema", "exp_avg"):
        found, expected = read_tensors(run, state), read_tensors(student, state)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    first = read_tensors(teachers.categorical, "ema")
    assert any(not torch.equal(tensor, first[name]) for name, tensor in read_tensors(run, "weight").items())


def test_a_teacher_may_be_an_export_and_is_the_same_teacher(
    trained: Trained, teachers: Teachers, tmp_path: Path
) -> None:
    exported = convert(teachers.categorical, tmp_path / "teacher")
    found = []
    for name, teacher in (("run", teachers.categorical), ("export", exported)):
        (tmp_path / name).mkdir()
        values = student_values(trained, teachers, tmp_path / name / "run", teacher=str(teacher))
        stage, batch = built(values, tmp_path / name)
        found.append((stage.state_dict(), stage(batch, {"targets": 1}).loss))
    (of_run, loss), (of_export, loss_of_export) = found
    assert of_run.keys() == of_export.keys()
    assert all(torch.equal(of_run[name], of_export[name]) for name in of_run)
    assert torch.equal(loss, loss_of_export)


def test_its_latent_space_is_that_of_its_teacher_and_not_of_one_before(
    trained: Trained, teachers: Teachers, tmp_path: Path
) -> None:
    """The statistics in a run's folder that never saved are measured anew for another teacher, and stay for one that was moved."""
    copy = tmp_path / "moved"
    shutil.copytree(teachers.categorical, copy)
    keys = []
    for name, teacher in (("a", teachers.categorical), ("b", copy), ("c", trained.dit)):
        values = student_values(trained, teachers, tmp_path / "run", teacher=str(teacher))
        config = load_config(tiny_run.write_config(tmp_path / f"{name}.json", values), [])
        keys.append(statistics_key(config, Manifest.load(config.data.path)))
    assert keys[0] == keys[1] != keys[2]


def test_it_is_exported_as_any_textldm_and_takes_one_evaluation_a_step(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = convert(student, tmp_path / "student")
    told = json.loads((folder / "generation_config.json").read_text())
    expected = {"num_steps": 3, "guidance_scale": 1.0, "solver": "euler", "temperature": 0.5, "grid": "training"}
    assert {name: told[name] for name in expected} == expected
    model, _ = load_exported(folder)
    assert model.config.times["spread"] == 1.5
    calls = []
    forward = model.dit.forward

    def counted(latents_TZ: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(len(latents_TZ))
        return forward(latents_TZ, *arguments, **options)

    monkeypatch.setattr(model.dit, "forward", counted)
    texts = model.generate([[3, 5, 7], [9]], max_new_tokens=6, eos_token_id=-1)
    assert [len(ids) for ids in texts] == [6, 6]
    assert calls == [3 + 6 + 1 + 6] * 3  # no unconditional half beside it
    dit = {name: x for name, x in read_tensors(student, "ema").items() if name.startswith("dit.")}
    assert all(torch.equal(model.state_dict()[name], x) for name, x in dit.items())


@pytest.mark.slow
def test_its_export_is_served_and_evaluated_with_its_own_steps(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = convert(student, tmp_path / "student")
    model, tokenizer = load_exported(folder)
    calls = []
    forward = model.dit.forward
    monkeypatch.setattr(model.dit, "forward", lambda *given, **more: (calls.append(0), forward(*given, **more))[1])
    ask = {"prompt": [3, 5, 7], "max_tokens": 6, "seed": 5}
    with running(model=model, tokenizer=tokenizer) as server:
        answer = server.http.post("/v1/completions", json=ask).json()
        (about,) = server.http.get("/v1/models").json()["data"]
    assert len(calls) == 3
    assert about["defaults"]["num_steps"] == 3
    tokens = model.generate([[3, 5, 7]], 6, seed=5)[0]
    assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    texts, output = write_texts(tmp_path / "wikipedia.jsonl", 6), tmp_path / "figures.json"
    few = ["--samples", "6", "--batch-size", "6"]
    few += [part for name in ("judge", "mauve-model", "bertscore-model") for part in (f"--{name}", "./gone")]
    assert evaluate.main(["--model", str(folder), "--benchmark", str(texts), "--output", str(output), *few]) == 0
    found = json.loads(output.read_text())
    assert {"rouge_2", "nats_per_token"} <= found["metrics"].keys()
    assert found["protocol"]["sampling"]["num_steps"] == 3
    assert "nats_per_token" in capsys.readouterr().out


def test_its_diagnosis_says_how_near_it_is_to_its_teacher(student: Path, tmp_path: Path) -> None:
    options = ["--rows", "4", "--set", "diagnose.sample_tokens=64", "--device", "cpu"]
    assert diagnose.main(["--run", str(student), "--output", str(tmp_path), *options]) in (0, 1)
    told = json.loads((tmp_path / "diagnosis.json").read_text())
    assert told["distilled"] == pytest.approx(1 - told["distill"] / told["distill_teacher"])
    assert (told["num_steps"], told["guidance_scale"], told["solver"]) == (3, 1.0, "euler")
    assert "nats_per_token" not in told
    assert "even_times" not in told  # a student's times are those that it was made for
    assert any("unguided step" in check["name"] for check in told["checks"])
    assert (tmp_path / "diagnosis.png").is_file()


def test_a_student_may_be_the_teacher_of_one_with_fewer_steps(
    trained: Trained, teachers: Teachers, student: Path, tmp_path: Path
) -> None:
    values = student_values(trained, teachers._replace(categorical=student), tmp_path / "run")
    values["distill"] |= {"num_steps": 1, "teacher_steps": 3, "guidance_scale": 1.0}
    stage, batch = built(values, tmp_path)
    before = read_tensors(student, "ema")
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.state_dict().items())
    assert stage.config.distill.teacher_passes == 3
    assert stage(batch, {"targets": 1}).loss.item() > 0


def test_the_plan_counts_what_the_stage_counts(trained: Trained, teachers: Teachers, tmp_path: Path) -> None:
    stage, batch = built(student_values(trained, teachers, tmp_path / "run"), tmp_path)
    outline = of_distill(stage.config, torch.device("meta"), stage.vae.config.vocab_size)
    assert sum(p.numel() for p in outline.trained.parameters()) == sum(p.numel() for p in stage.parameters())
    assert len(outline.frozen) == 2
    windows = Windows([8, 8])
    own = outline.flops(windows)
    stage.config.distill.teacher_steps *= 3
    assert of_distill(stage.config, torch.device("meta")).flops(windows) > own
    assert stage.flops(batch) > 0
    with torch.no_grad():
        assert outline.loss(windows).is_meta


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("train", {"init_from": "runs/x"}, "stage distill starts from the weights of distill.teacher"),
        ("model", {"self_conditioning": True}, "stage distill learns single steps"),
        ("data", {"split": {"kind": "none"}}, "stage distill needs context"),
        ("distill", {"guidance_interval": [0.7, 0.3]}, "expected times that rise"),
        ("distill", {"teacher_steps": 0}, "distill.teacher_steps"),
        ("diagnose", {"num_steps": 50}, "set diagnose.num_steps=3, or leave it out"),
        ("diagnose", {"guidance_scale": 2.0}, "set diagnose.guidance_scale=1.0, or leave it out"),
        ("model", {"head": "velocity"}, "only the categorical head has probabilities to sharpen"),
    ],
)
def test_what_a_configuration_may_not_say(
    trained: Trained, teachers: Teachers, tmp_path: Path, section: str, values: dict, said: str
) -> None:
    config = student_values(trained, teachers, tmp_path / "run")
    config[section] = config.get(section, {}) | values
    with pytest.raises(UserError, match=said):
        load_config(tiny_run.write_config(tmp_path / "c.json", config), [])


def test_a_teacher_that_does_not_fit_is_one_line(
    trained: Trained, teachers: Teachers, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, (teacher, said) in enumerate(
        (
            (
                trained.vae,
                "is a run of stage vae; expected a run or an export (textldm convert) of stage dit or distill",
            ),
            (tmp_path / "absent", "say where it is now with --set distill.teacher="),
            (trained.dit, "does not fit the model"),
        )
    ):
        values = student_values(trained, teachers, tmp_path / f"run{i}", teacher=str(teacher))
        config = tiny_run.write_config(tmp_path / "c.json", values)
        assert train.main(["--config", str(config)]) == 2
        assert said in capsys.readouterr().err
    # A run, which may be downloaded, names no other teacher than its own.
    config = config_of(student)
    config.distill.teacher = str(trained.dit)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/config.json").write_text(json.dumps(config.told()))
    (tmp_path / "copy/checkpoints").symlink_to(student / "checkpoints")
    assert diagnose.main(["--run", str(tmp_path / "copy"), "--rows", "4", "--device", "cpu"]) == 2
    assert "distill.teacher of the run's configuration is" in capsys.readouterr().err
