"""The twelve minutes on a GPU: every part's code runs, and whatever happens to one, what was measured is kept and the rest says why not."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_parts, results
from benchmarks.gpu_parts import Missing, Row
from benchmarks.measuring import surroundings

PART = gpu.Part("one", "loader", 5, ("first", "second"), "one_part")


def ran(function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, seconds: float = 20, is_dry: bool = True) -> Any:
    """The rows of a part, run in a process of its own as on a GPU."""
    monkeypatch.setattr(gpu_parts, "one_part", function, raising=False)
    lines = gpu.run(PART, seconds, True)
    return gpu.rows_of(PART, lines, is_dry)["loader"]


def one_row(*_: object) -> Iterator[Row]:
    yield Row("first", [7])


def failing(*_: object) -> Iterator[Row]:
    yield Row("first", [7])
    raise RuntimeError("CUDA out of memory\nand more")


def hanging(*_: object) -> Iterator[Row]:
    yield Row("first", [7])
    time.sleep(60)


def slow(*_: object) -> Iterator[Row]:
    time.sleep(0.3)
    yield Row("first", [7])
    yield Row("second", [8])


def lacking(*_: object) -> Iterator[Row | Missing]:
    yield Row("first", [7])
    yield Missing("second", "no such kernel")


@pytest.mark.parametrize(
    ("function", "seconds", "why"),
    [
        (one_row, 20, "its code gave no such row"),
        (failing, 20, "RuntimeError: CUDA out of memory and more"),
        (hanging, 2, "ended after 2 s"),
        (slow, 0.2, "the part's 0 s were over|ended after 0 s"),
        (lacking, 20, "no such kernel"),
    ],
)
def test_what_was_measured_is_kept_and_the_rest_says_why_not(
    function: Callable[..., Any], seconds: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ran(function, monkeypatch, seconds, is_dry=False)
    if function is not slow:
        assert first == ["first", 7, ""]
    assert second[1] == gpu.NOT_MEASURED
    assert second[2] in why.split("|")


def test_no_figure_of_a_cpu_stands_in_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ran(one_row, monkeypatch) == [
        ["first", gpu.NOT_MEASURED, gpu.DRY],
        ["second", gpu.NOT_MEASURED, "its code gave no such row"],
    ]


def test_tables_are_written_after_each_part_above_those_of_earlier_days(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    book = gpu.Book(SimpleNamespace(output=path, dry=False), surroundings())  # type: ignore[arg-type]
    book.write([PART], {"one": [{"error": "its turn did not come"}]})
    assert results.read(path)["tables"][-1]["rows"][0] == ["first", gpu.NOT_MEASURED, "its turn did not come"]
    book.write([PART], {"one": [{"card": "NVIDIA H200"}, {"name": "first", "figures": [7]}, {"error": "x"}]})
    again = gpu.Book(SimpleNamespace(output=path, dry=False), surroundings())  # type: ignore[arg-type]
    again.write([PART], {"one": [{"card": "NVIDIA H200"}, {"name": "first", "figures": [8]}]})
    loaders = [table for table in results.read(path)["tables"] if table["title"] == gpu.TITLES["loader"]]
    assert [table["rows"][0] for table in loaders] == [["first", 8, ""], ["first", 7, ""]]
    assert loaders[0]["machine"].startswith("NVIDIA H200; torch 2.")
    assert "| first | 8 |  |" in results.render(tmp_path)
    assert gpu.file_name("NVIDIA H200") == "h200"


def test_the_time_is_that_of_all_parts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now, asked = [0.0], []

    def run(part: gpu.Part, seconds: float, is_dry: bool, method: str) -> list[dict]:
        asked.append((part.name, seconds))
        now[0] += seconds
        return [{"error": f"ended after {seconds:.0f} s"}]

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    assert gpu.main(["--dry", "--seconds", "400"]) == 1
    assert [name for name, _ in asked] == ["card", "dit_b", "dit_xl"]  # the most important come first
    assert sum(seconds for _, seconds in asked) <= 400
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "loader: the 400 s were over" in figures["failed"]
    assert sum(part.seconds for part in gpu.parts_of(["dit_b", "dit_xl", "vae_base"])) <= 800


@pytest.mark.parametrize("touches", [["fork"], ["spawn"], []])
def test_parts_are_forked_where_that_can_compute_on_a_gpu(touches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def context(method: str) -> SimpleNamespace:
        process = SimpleNamespace(start=lambda: None, join=lambda: None, exitcode=int(method not in touches))
        return SimpleNamespace(Process=lambda target: process)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(gpu.multiprocessing, "get_context", context)
    assert gpu.start_method() == (touches[0] if touches else None)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "start_method", lambda: None)
    assert gpu.main([]) == 2
    assert "torch sees no GPU here; --dry runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...FusedAdamMathFunctor...>", "optimizer"),
        ("triton_poi_fused_gelu_3", "compiled"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::exp_kernel_cuda...>", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert gpu_parts.kind_of(kernel) == kind


@pytest.mark.slow
def test_every_part_runs_in_miniature(tmp_path: Path) -> None:
    root, output = Path(gpu.__file__).resolve().parent.parent, tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--output", str(output)]
    done = subprocess.run(command, cwd=root, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    tables = results.read(output)["tables"]
    assert [table["title"] for table in tables] == list(gpu.TITLES.values())
    rows = [row for table in tables for row in table["rows"]]
    assert {row[1] for row in rows} == {gpu.NOT_MEASURED}
    # What a CPU has no kernel for, and a package that may be missing; all else ran.
    others = {row[-1] for row in rows} - {gpu.DRY}
    assert others <= {f"{name} is not to be had here" for name in ("flash_attn", "torch_varlen")} | {
        "No module named 'liger_kernel'"
    }
