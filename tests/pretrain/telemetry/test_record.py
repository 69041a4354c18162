"""Telemetry: the formulas, the sums over micro-batches and ranks, and files that survive kills."""

import json
import math
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.ranks.distributed import Topology
from pretrain.telemetry.flops import PEAK_TFLOPS, peak_flops, transformer_flops
from pretrain.telemetry.identity import run_id
from pretrain.telemetry.metrics import MetricSums, reduce_metrics
from pretrain.telemetry.record import ForwardTimer, Telemetry, TelemetryState, find_stragglers
from pretrain.telemetry.sinks import describe_figures, duration, read_metrics, wandb_mode
from tests.pretrain import tiny_run


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    values = tiny_run.config_values(tmp_path / "data", tmp_path / "run", log_every=2, steps=8)
    return load_config(tiny_run.write_config(tmp_path / "c.json", values))


def make_telemetry(config: RunConfig, **options: object) -> Telemetry:
    options = {"row_tokens": 32, "stage": nn.Linear(2, 2), "precision": "fp32", **options}
    return Telemetry(config.run_folder, config, Topology(), **options)  # type: ignore[arg-type]


def take_step(telemetry: Telemetry, step: int, metric: float = 1.0, skipped: str | None = None) -> None:
    telemetry.begin_step()
    telemetry.add({"ce": torch.tensor([metric * 4, 4.0])}, flops=1e9)
    telemetry.end_step(step, loss=metric, grad_norm=0.5, lr=0.1, wait_seconds=0.0, skipped=skipped)


def test_flops_equal_those_of_matrix_products_counted_one_by_one() -> None:
    width, layers, lengths = 64, 3, [5, 11]
    total = 0
    for length in lengths:
        per_layer = 2 * length * width * (3 * width + width + 4 * width + 4 * width)  # qkv, out, mlp in, mlp out
        per_layer += 2 * length * length * width * 2  # q k^T and the weighted sum, all heads together
        total += layers * per_layer
    assert transformer_flops(layers * 12 * width**2, layers, width, lengths, passes=1) == total
    assert transformer_flops(layers * 12 * width**2, layers, width, lengths) == 3 * total


def test_peaks() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops("cpu", "fp32") is None
    for unknown in ("NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA A100X", "NVIDIA H200X"):
        assert peak_flops(unknown, "bf16") is None, unknown
    for name, peaks in PEAK_TFLOPS.items():
        assert peak_flops(f"NVIDIA {name}", "bf16") == peaks[0] * 1e12, name
    assert peak_flops("cpu", "fp32", configured_tflops=0.12) == 0.12e12


def test_metric_sums_are_weighted_means_whatever_the_micro_batches() -> None:
    values, weights = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^metric b has shape \[\]; expected a \(sum, weight\) pair"):
        MetricSums().add({"a": (1.0, 1.0), "b": torch.tensor(1.0)})
    whole, parts = MetricSums(), MetricSums()
    whole.add({"a": ((values * weights).sum(), weights.sum()), "empty": (torch.tensor(0.0), 0)})
    for value, weight in zip(values, weights):
        parts.add({"empty": (torch.tensor(0.0), 0), "a": torch.stack((value * weight, weight))})
    expected = ((values * weights).sum() / weights.sum()).item()
    for sums in (whole, parts):
        assert reduce_metrics(sums.totals()) == {"a": pytest.approx(expected, rel=1e-12)}
    with pytest.raises(ValueError, match="same metrics"):
        whole.add({"b": (1.0, 1.0)})


def test_a_logged_line_is_the_mean_over_its_window(config: RunConfig) -> None:
    telemetry = make_telemetry(config)
    for step in range(4):
        take_step(telemetry, step, metric=float(step))
    telemetry.close()
    lines = read_metrics(config.run_folder)
    assert [(line["step"], line["ce"], line["loss"]) for line in lines] == [(2, 0.5, 1.0), (4, 2.5, 3.0)]
    assert all(line["tokens_per_s"] > 0 and 0 < line["goodput"] <= 1 and line["peak_memory_gib"] > 0 for line in lines)
    assert "mfu" not in lines[0]


def test_skipped_steps_leave_metrics_finite_and_are_counted(config: RunConfig) -> None:
    telemetry = make_telemetry(config)
    take_step(telemetry, 0, metric=3.0)
    take_step(telemetry, 1, metric=math.nan, skipped="the loss is nan")
    telemetry.close()
    (line,) = read_metrics(config.run_folder)
    assert (line["ce"], line["skipped"], line["loss"]) == (3.0, 1, None)


def test_mfu_is_flops_over_time_and_peak(config: RunConfig) -> None:
    config.telemetry.peak_tflops = 1.0
    telemetry = make_telemetry(config)
    take_step(telemetry, 0)
    take_step(telemetry, 1)
    telemetry.close()
    (line,) = read_metrics(config.run_folder)
    assert line["mfu"] == pytest.approx(1e9 / line["step_s"] / 1e12, rel=1e-6)


def test_goodput_counts_the_time_between_restarts(config: RunConfig) -> None:
    config.run_folder.mkdir()
    first = {"kind": "event", "event": "start", "time": time.time() - 1000}
    (config.run_folder / "metrics.jsonl").write_text(json.dumps(first) + "\n")
    telemetry = make_telemetry(config, start_step=2, state=TelemetryState(productive_s=600.0))
    take_step(telemetry, 2)
    take_step(telemetry, 3)
    telemetry.close()
    assert read_metrics(config.run_folder)[-1]["goodput"] == pytest.approx(0.6, abs=0.01)


def test_a_torn_line_is_ended_and_repeated_steps_are_read_once(config: RunConfig) -> None:
    telemetry = make_telemetry(config)
    take_step(telemetry, 0)
    take_step(telemetry, 1, metric=1.0)
    telemetry.close()
    with open(config.run_folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 4, "lo')
    telemetry = make_telemetry(config)
    take_step(telemetry, 1, metric=7.0)
    telemetry.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(config.run_folder)] == [(2, 7.0)]


def test_the_forward_timer_counts_forward_passes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("pretrain.telemetry.record.time.perf_counter", lambda: clock[0])

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            clock[0] += 0.25
            return x

    module = Slow()
    timer = ForwardTimer(module, torch.device("cpu"))
    module(torch.zeros(1))
    clock[0] += 1.0
    module(torch.zeros(1))
    assert timer.take() == 0.5
    assert timer.take() == 0


def test_stragglers() -> None:
    assert find_stragglers([1.0, 1.1, 0.9, 1.6], window_s=4.0) == {"3": 1.6}
    assert find_stragglers([1.0, 1.1, 0.9, 1.6], window_s=40.0) == {}
    assert find_stragglers([1.0, 2.0], window_s=4.0) == {"1": 2.0}
    assert find_stragglers([1.0], window_s=1.0) == {}
    assert find_stragglers([0.0, 0.0, 0.0], window_s=1.0) == {}


def test_a_recorder_that_cannot_start_is_left_out(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    config.telemetry.wandb = True
    monkeypatch.setattr("pretrain.telemetry.sinks.wandb_mode", lambda: "nonsense")
    telemetry = make_telemetry(config)
    take_step(telemetry, 0)
    take_step(telemetry, 1)
    telemetry.close()
    assert "wandb is left out" in capsys.readouterr().out
    assert len(read_metrics(config.run_folder)) == 1


def test_a_recorder_that_cannot_close_ends_no_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def no_network() -> None:
        raise OSError("no network")

    closed: list[bool] = []
    makers = {"wandb": no_network, "tensorboard": lambda: closed.append(True)}
    for name, close in makers.items():
        recorder = (lambda numbers, step: None, close)
        monkeypatch.setattr(f"pretrain.telemetry.sinks.start_{name}", lambda run, config, recorder=recorder: recorder)
    config.telemetry.wandb = config.telemetry.tensorboard = True
    telemetry = make_telemetry(config)
    take_step(telemetry, 0)
    telemetry.close()
    assert closed == [True]
    assert "wandb did not close: OSError: no network" in (config.run_folder / "log.txt").read_text()


@pytest.mark.parametrize("where", ["starts", "writes", "closes"])
def test_a_recorder_that_hangs_holds_up_nobody(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys, where: str
) -> None:
    release = threading.Event()

    def start(run: Path, config: RunConfig) -> tuple:
        hang = lambda *_: release.wait()  # noqa: E731
        pause = hang if where == "starts" else print
        pause()
        return hang if where == "writes" else lambda *_: None, hang if where == "closes" else lambda: None

    monkeypatch.setattr("pretrain.telemetry.sinks.start_wandb", start)
    monkeypatch.setattr("pretrain.telemetry.sinks.CLOSE_S", 0.2)
    config.telemetry.wandb = True
    telemetry = make_telemetry(config)
    for step in range(4):
        take_step(telemetry, step)
    telemetry.close()
    release.set()
    assert "wandb hangs, and is left to itself" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(config.run_folder)] == [2, 4]


def test_a_terminal_that_is_paused_holds_up_nobody(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr("pretrain.telemetry.sinks.CLOSE_S", 0.2)
    monkeypatch.setattr("builtins.print", lambda *_, **__: release.wait())
    telemetry = make_telemetry(config)
    for step in range(4):
        take_step(telemetry, step)
    telemetry.close()
    release.set()
    assert [line["step"] for line in read_metrics(config.run_folder)] == [2, 4]
    assert "the terminal hangs" in (config.run_folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_DISABLED": "true"}, "disabled"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_BASE_URL": "https://wandb.lab.example:8080"}, "online"),
        ({"WANDB_BASE_URL": "https://api.wandb.ai"}, "offline"),
    ],
)
def test_what_wandb_may_do_is_what_its_variables_and_keys_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine wandb.lab.example\n  login user\n  password key\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wandb_mode() == expected


def test_a_copy_at_the_same_path_of_another_machine_is_a_run_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    own = run_id(run)
    monkeypatch.setattr("socket.gethostname", lambda: "another")
    assert run_id(run) == own  # on a file system that both see
    shutil.copytree(run, tmp_path / "copy")
    run.rename(tmp_path / "away")
    (tmp_path / "copy").rename(run)
    monkeypatch.setattr("socket.gethostname", lambda: "a third one")
    assert run_id(run) != own


def test_an_id_goes_with_the_folder_but_not_with_its_copies(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    own = run_id(run)
    assert run_id(run) == own
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert run_id(copy) == run_id(copy) != own
    assert run_id(Path(shutil.copytree(copy, tmp_path / "copy of the copy"))) not in (own, run_id(copy))
    moved = run.rename(tmp_path / "moved")
    assert run_id(moved) == own
    shutil.copytree(moved, tmp_path / "backup")
    shutil.rmtree(moved)
    (tmp_path / "backup").rename(moved)
    assert run_id(moved) == own


def test_wandb_offline(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.telemetry.wandb = True
    telemetry = make_telemetry(config)
    take_step(telemetry, 0)
    take_step(telemetry, 1)
    telemetry.close()
    assert list((config.run_folder / "wandb").glob("offline-run-*/*.wandb"))


def test_tensorboard(config: RunConfig) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config.telemetry.tensorboard = True
    telemetry = make_telemetry(config)
    for step in range(4):
        take_step(telemetry, step, metric=float(step))
    telemetry.close()
    events = accumulator.EventAccumulator(str(config.run_folder / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("ce")] == [(2, 0.5), (4, 2.5)]


def test_quarters_are_printed_together() -> None:
    assert describe_figures({"flow": 1.5, "flow_q1": 1.0, "flow_q2": 2.0}) == "flow 1.5  flow by quarter of t [1 2]"


def test_durations() -> None:
    assert duration(3725) == "01:02:05"
    assert duration(2 * 86400 + 61) == "2 d 00:01:01"
