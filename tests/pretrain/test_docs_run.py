"""The commands and snippets of the pages are typed here as they stand there, where they run on a small machine without a network.

Names of what a reader would have made are links to small runs; tests/test_docs.py sees to it that the others are understood.
"""

import importlib
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline.text.readers import registry
from data_pipeline.text.sources import open_source
from modeling.solvers import integrate
from pretrain import train
from pretrain.__main__ import main
from tests.pretrain.conftest import Trained
from tests.pretrain.tiny_pipeline import WORDS
from tests.test_docs import LAUNCHERS, LINES, ROOT, snippets

NAMES = {"Y": "tokenizer", "X": "my.jsonl", "FOLDER": "data/folder", "runs/x": "runs/dit_xl", "runs/X": "runs/dit_xl"}
"""What stands for names in the pages, and for models of the hub."""
HUB = re.compile(r"(Qwen|segyges)/")


def why_not(words: list[str]) -> str:
    """Why a command of the pages is parsed and not run; empty for one that is run."""
    program, *rest = words
    name, arguments = (rest[0], rest[1:]) if program == "textldm" and rest else ("", rest)
    reasons = {
        "it starts processes on hosts or GPUs": program in LAUNCHERS or words[:2] == ["python", "-u"] or "--hostfile" in words,
        "it asks other hosts": words[:3] == ["textldm", "hosts", "check"],
        "it asks a hub": (bool(HUB.search(" ".join(words))) and name != "prepare") or "segyges/OpenWebText2" in words,
        "it asks a scheduler: tests/test_cluster.py": program in ("sbatch", "kubectl"),
        "it shows an option": name == "prepare" and not {"--source", "verify", "inspect"} & set(words),
        "it installs, or runs the recipe: tests/pretrain/quickstart": program in ("./run.sh", "pip", "source", "eval"),
        "its model has hundreds of millions of parameters": name in ("train", "supervise"),
        "it needs a cache of features: tests/data_pipeline/test_cache_features.py": name == "cache",
        "it measures for half a minute: tests/pretrain/diagnose/test_command.py": name == "diagnose",
        "it serves until it is stopped: tests/pretrain/serve": name == "serve",
        "it plans for half a minute: tests/pretrain/plan": name == "plan",
        "it judges a model for minutes: tests/pretrain/evaluate": name == "evaluate",
        "it shows another run and results of evaluations: tests/pretrain/report": "--evaluation" in words,
        "a benchmark": program == "python",
        "it names a command": not arguments or "NAME" in words,
        "it names a part of a command": len(arguments) == 1 and not arguments[0].startswith("-") and name != "config",
    }  # fmt: skip
    return next((reason for reason, holds in reasons.items() if holds), "")


RUN = [words for _, words in LINES if not why_not(words)]
"""In the pages' order."""


@pytest.fixture(scope="module")
def desk(trained: Trained, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a reader might stand, with what the pages have made by then."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "data").mkdir()
    (folder / "export").mkdir()
    (folder / "runs").mkdir()
    for name in ("data/owt2", "data/mine"):
        (folder / name).symlink_to(trained.data)
    (folder / "tokenizer").symlink_to(trained.data / "tokenizer")
    for name in ("runs/dit_xl", "runs/my_dit", "runs/my_student"):
        (folder / name).symlink_to(trained.dit)
    for name in ("runs/vae_base", "runs/my_vae"):
        (folder / name).symlink_to(trained.vae)
    (folder / "export" / "textldm-xl").symlink_to(exported)
    lines = [json.dumps({"text": " ".join(f"w{n % 60 + 1}" for n in range(start, start + 40))}) for start in range(200)]
    (folder / "my.jsonl").write_text("\n".join(lines))
    pairs = [json.dumps({"prompt": f"w{n % 60 + 1} " * 9, "response": f"w{n % 50 + 2}"}) for n in range(200)]
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    return folder


@pytest.mark.parametrize("words", RUN, ids=" ".join)
def test_a_command_runs(words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(desk)
    arguments = [NAMES.get(word, "tokenizer" if HUB.match(word) else word) for word in words[1:]]
    name = arguments[0]
    writes = {"prepare": "--output", "convert": "--output", "report": "--output"}.get(name)
    if writes in arguments:
        arguments[arguments.index(writes) + 1] = str(tmp_path / ("made.html" if name == "report" else "made"))
    if name == "prepare" and "--source" in arguments:
        arguments += ["--workers", "1", "--max-document-length", "32", "--row-tokens", "64"]
    assert (main(arguments) or 0) == 0
    assert not writes or "--output" not in arguments or (tmp_path / "made").exists()


def test_what_is_not_run_has_its_reason() -> None:
    assert {words[1] for words in RUN} >= {"prepare", "convert", "generate", "report", "config", "checkpoint"}


def test_the_exported_model_is_used_as_the_readme_says(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = snippets(ROOT / "README.md", "python")
    monkeypatch.chdir(desk)
    assert "max_new_tokens=128" in code  # its windows are longer than ours
    exec(compile(code.replace("max_new_tokens=128", "max_new_tokens=12"), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert said.split()
    assert set(re.findall(r"\w+", said)) <= set(WORDS)  # continuations, and no question


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package that docs/extending.md writes, installed with the entry points that it names."""
    page, site = ROOT / "docs" / "extending.md", tmp_path / "site"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package-1.0.dist-info").mkdir()
    (site / "my_package" / "__init__.py").touch()
    for code in snippets(page, "python"):
        _, *parts = re.split(r"^# my_package/(\w+\.py)\n", code, flags=re.MULTILINE)
        for name, text in itertools.batched(parts, 2) if sys.version_info >= (3, 12) else zip(parts[::2], parts[1::2]):
            (site / "my_package" / name).write_text(text)
    told = re.findall(
        r'^    \[project\.entry-points\."(textldm\.\w+)"\].*\n    (\w+) = "(my_package\.[\w:.]+)"',
        page.read_text(),
        re.MULTILINE,
    )
    assert len(told) == 5
    entries = "".join(f"[{group}]\n{name} = {place}\n" for group, name, place in told)
    (site / "my_package-1.0.dist-info" / "entry_points.txt").write_text(entries)
    (site / "my_package-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n"
    )
    monkeypatch.syspath_prepend(str(site))
    registry._names.cache_clear()  # readers are looked for once a process
    yield tmp_path
    registry._names.cache_clear()


def test_parts_are_added_as_the_page_says(my_package: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(my_package)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # The solver: of dz/dt = z it is exact to the second order.
    midpoint = importlib.import_module("my_package.midpoint").MIDPOINT
    times = torch.linspace(1, 0, 65).tolist()
    z_TZ = integrate(lambda z_TZ, t: z_TZ, torch.ones(1, 1), times, midpoint)
    assert float(z_TZ) == pytest.approx(torch.tensor(-1.0).exp().item(), abs=1e-4)
    # The reader.
    (my_package / "corpus").mkdir()
    (my_package / "corpus" / "a.verse").write_text("one***two")
    assert list(open_source(str(my_package / "corpus"))) == ["one", "two"]
    # The stage, its configuration, and the optimizer.
    (text,) = snippets(ROOT / "docs" / "extending.md", "json")
    values = json.loads(text)
    values["optimizer"] = {"kind": "sgd", "lr": 0.1, "momentum": 0.8}
    values["data"] |= {"path": str(trained.data), "streams": 2, "rows_per_step": 4, "micro_batch_rows": 2}
    (my_package / "mine.json").write_text(json.dumps(values))
    quick = ["train.steps=2", "train.run=runs/mine"]
    assert train.main(["--config", "mine.json", *(f"--set={key}" for key in quick)]) == 0
    assert (my_package / "runs" / "mine" / "checkpoints" / "latest").read_text() == "step-000000002\n"
