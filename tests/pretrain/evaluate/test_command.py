"""`textldm evaluate` as a user runs it: files, tables, sweeps, mistakes."""

import json
import shutil
from pathlib import Path

import pytest

from pretrain.evaluate import tables
from pretrain.evaluate.__main__ import main
from pretrain.evaluate.tables import read_result
from tests.pretrain import forked_ranks
from tests.pretrain.evaluate.token_runs import write_texts

FEW = [
    "--samples",
    "24",
    "--batch-size",
    "5",
    "--judge",
    "./gone",
    "--mauve-model",
    "./gone",
    "--bertscore-model",
    "./gone",
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "wikipedia.jsonl", 30)


def evaluate(model: object, texts: Path, output: Path, *more: str) -> dict:
    assert main(["--model", str(model), "--benchmark", str(texts), "--output", str(output), *FEW, *more]) == 0
    return json.loads(output.read_text())


def timeless(result: dict) -> dict:
    metrics = {name: value for name, value in result["metrics"].items() if name not in ("seconds", "tokens_per_second")}
    return result | {"metrics": metrics}


def test_a_models_figures_have_intervals_and_say_everything_that_would_change_them(
    exported: Path, trained, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(exported, texts, tmp_path / "a.json", "--num-steps", "2", "--data", str(trained.data))
    assert {
        "rouge_1",
        "rouge_2",
        "rouge_l",
        "distinct_2",
        "entropy",
        "nats_per_token",
        "bits_per_byte",
        "real_words",
    } <= set(found["metrics"])
    for figure in found["metrics"].values():
        assert set(figure) == {"value", "low", "high", "n"}
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["n"] == 24
    assert set(found["left_out"]) == {"mauve", "bertscore", "generative_nll"}
    assert found["protocol"]["sampling"]["num_steps"] == 2
    assert found["protocol"]["samples"] == 24
    assert found["versions"]["torch"]
    shown = capsys.readouterr().out
    assert "nats_per_token" in shown
    assert "left out: mauve" in shown
    assert "| nats_per_token" in (tmp_path / "a.md").read_text()
    # Again: nothing is written anew, and the figures are the same to the bit.
    assert evaluate(exported, texts, tmp_path / "a.json", "--num-steps", "2", "--data", str(trained.data)) == found
    for part in sorted((tmp_path / "a.samples").glob("batch-*"))[::2]:
        part.unlink()
    resumed = evaluate(exported, texts, tmp_path / "a.json", "--num-steps", "2", "--data", str(trained.data))
    assert timeless(resumed) == timeless(found)


@pytest.mark.slow
def test_ranks_of_a_launcher_share_the_texts_and_one_writes_the_figures(
    exported: Path, texts: Path, tmp_path: Path
) -> None:
    given = ["--model", str(exported), "--benchmark", str(texts), "--num-steps", "2", *FEW]
    shared = ["evaluate", *given, "--output", str(tmp_path / "two.json")]
    ranks = forked_ranks.start_module("pretrain.__main__", shared, tmp_path / "log", ranks=2)
    assert forked_ranks.finish(ranks) == [0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("this rank's texts are written") == 1
    alone = evaluate(exported, texts, tmp_path / "one.json", "--num-steps", "2")
    found = json.loads((tmp_path / "two.json").read_text())
    assert timeless(found)["metrics"] == timeless(alone)["metrics"]


def test_the_reference_is_the_best_and_chance_has_no_likelihood(texts: Path, tmp_path: Path) -> None:
    reference, chance = (evaluate(name, texts, tmp_path / f"{name}.json") for name in ("reference", "chance"))
    assert reference["metrics"]["rouge_2"]["value"] == 1
    assert chance["metrics"]["rouge_2"]["value"] < 0.2
    assert "nats_per_token" not in chance["metrics"]
    assert "seconds" not in reference["metrics"]


def test_several_results_are_one_table_with_the_papers_rows_where_its_protocol_is_the_same(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [evaluate(name, texts, tmp_path / f"{name}.json") for name in ("reference", "chance")]
    capsys.readouterr()
    assert main(["table", str(tmp_path / "reference.json"), str(tmp_path / "chance.json"), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "| reference" in shown
    assert "| chance" in shown
    assert "the paper's" not in shown  # 24 documents are not its thousand
    results[0]["protocol"]["samples"] = 1000
    assert "TextLDM 768M, the paper's" in tables.several(results[:1], "simple")
    results[0]["protocol"]["max_words"] = 120  # nor are short beginnings
    assert "the paper's" not in tables.several(results[:1], "simple")
    assert read_result(tmp_path / "chance.json")["model"] == "chance"


def test_a_sweep_names_its_pareto_set_and_writes_the_best_as_defaults(
    exported: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(exported, tmp_path / "model")
    given = ["sweep", "--model", str(copy), "--benchmark", str(texts), "--output", str(tmp_path / "s.json"), *FEW]
    swept = ["--num-steps", "1", "3", "--guidance-scales", "1", "2", "--by", "rouge_1", "--write-defaults"]
    assert main([*given, *swept]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    assert len(found["points"]) == 4
    assert sorted(point["evaluations"] for point in found["points"]) == [1, 2, 3, 6]
    best = found["points"][found["pareto"][-1]]
    cheaper = [p for p in found["points"] if p["evaluations"] <= best["evaluations"]]
    assert best["metrics"]["rouge_1"]["value"] == max(p["metrics"]["rouge_1"]["value"] for p in cheaper)
    config = json.loads((copy / "generation_config.json").read_text())
    assert (config["num_steps"], config["guidance_scale"]) == (
        found["best"]["num_steps"],
        found["best"]["guidance_scale"],
    )
    assert (tmp_path / "s.png").stat().st_size > 5000
    assert "Pareto set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "reference", "--benchmark", "gone.jsonl", "--output", "x.json"], "no such file"),
        (["--model", "reference", "--benchmark", "wikipedai", "--output", "x.json"], "expected wikipedia"),
        (["--model", "./gone", "--benchmark", "wikipedia", "--output", "x.json"], "no such folder"),
        (["--model", "ngram", "--benchmark", "wikipedia", "--output", "x.json"], "--data"),
        (["--model", "reference", "--benchmark", "TEXTS", "--output", "x.json", "--samples", "0"], "at least 1"),
        (["--model", "reference", "--benchmark", "TEXTS", "--output", "x.json", "--samples", "31"], "ask for --samples 30"),
        (["--model", "reference", "--benchmark", "TEXTS", "--output", "x.txt"], "ends in .json"),
        (["--model", "reference", "--benchmark", "TEXTS", "--output", "x.json", "--temperature", "0"], "above 0"),
        (["table", "gone.json"], "is no result of textldm evaluate"),
        (["sweep", "--model", "reference", "--benchmark", "TEXTS", "--output", "x.json"], "nothing to sweep"),
        (["sweep", "--model", "reference", "--benchmark", "TEXTS", "--output", "x.json", "--num-steps", "2"], "exported TextLDM"),
        (
            ["sweep", "--model", "reference", "--benchmark", "TEXTS", "--output", "x.json", "--guidance-intervals", "3"],
            "expected FROM:TO",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(texts) if word == "TEXTS" else word for word in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert not list(tmp_path.glob("x.*"))


def test_other_settings_are_refused_until_told_to_begin_anew(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate("chance", texts, tmp_path / "a.json")
    arguments = [
        "--model",
        "chance",
        "--benchmark",
        str(texts),
        "--output",
        str(tmp_path / "a.json"),
        *FEW,
        "--seed",
        "1",
    ]
    assert main(arguments) == 2
    assert "--fresh" in capsys.readouterr().err
    assert main([*arguments, "--fresh"]) == 0
