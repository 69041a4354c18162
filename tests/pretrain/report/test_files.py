"""What a run's folder holds is read as training wrote it; what is missing, torn or another's is told apart."""

import json
from pathlib import Path

import pytest

from data_pipeline.core.errors import UserError
from pretrain.report.files import flat, number, read_metrics, read_run, read_trajectory
from tests.pretrain.report.run_folder import (
    data_manifest,
    evaluation,
    save_checkpoint,
    sweep,
    train_line,
    write_lines,
    write_run,
)


def test_a_whole_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert (run.stage, run.step) == ("dit", 200)
    assert run.data == data_manifest("x")
    assert run.vae is not None
    assert len(run.vae.train) == 49
    assert [result["benchmark"] for result in run.evaluations] == ["x"]
    assert [t for t, _ in run.trajectory or []] == [1.0, 0.5, 0.0]
    assert run.checkpoint is not None
    assert run.setting("train.steps") == 200
    assert run.setting("train.steps.more") is None


def test_a_run_that_has_just_begun_has_a_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"stage": "vae"}))
    run = read_run(tmp_path)
    assert (run.diagnosis, run.trajectory, run.checkpoint, run.data, run.step) == (None, None, None, None, 0)


def test_of_repeated_steps_and_their_texts_the_last_count(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = [
        train_line(10, loss=1.0),
        {"kind": "eval", "step": 10, "eval/a": 1},
        {"kind": "sample", "step": 10, "generated": "old"},
    ]
    again = [
        train_line(10, loss=2.0),
        {"kind": "eval", "step": 10, "eval/a": 2},
        {"kind": "sample", "step": 10, "generated": "new"},
    ]
    write_lines(path, first + again)
    found = read_metrics(path)
    assert [line["loss"] for line in found.train] == [2.0]
    assert [line["eval/a"] for line in found.eval] == [2]
    assert [line["generated"] for line in found.samples] == ["new"]


def test_torn_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        json.dumps(train_line(10)).encode() + b'\n{"kind": "tr\n\xff\xfe\n\n' + json.dumps(train_line(20)).encode()
    )
    found = read_metrics(path)
    assert ([line["step"] for line in found.train], found.torn) == ([10, 20], 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json is damaged"),
        ("config.json", "[" * 5000, "config.json is damaged"),
        ("config.json", "[]", "stage is None; expected one of vae, dit, distill, ar, mdlm"),
        ("config.json", '{"stage": "dti"}', "stage is 'dti'; expected one of vae, dit, distill, ar, mdlm"),
        ("metrics.jsonl", "x\ny\n", "none of its lines is JSON"),
        ("metrics.jsonl", "[1]\n", "line 1 is not what training writes"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n{"kind": "train", "step": "2"}\n', "line 2 is not what training writes"),
        ("metrics.jsonl", '{"kind": "train", "step": -1}\n', "line 1 is not what training writes"),
        ("diagnosis.json", "{}", "is not what textldm diagnose writes"),
        ("diagnosis.json", '{"verdict": "go", "checks": [{"name": 1}]}', "is not what textldm diagnose writes"),
        ("diagnosis.json", "{", "diagnosis.json is damaged"),
        ("trajectory.json", "[]", "is not a trajectory"),
        ("trajectory.json", '[{"t": 1}]', "is not a trajectory"),
        ("trajectory.json", '{"t": 1, "text": "x"}', "is not a trajectory"),
        ("trajectory.json", '[{"t": NaN, "text": "x"}]', "is not a trajectory"),
        ("wiki.json", '{"benchmark": "x", "metrics": {"a": {"value": "1"}}}', "is no result of textldm evaluate"),
        ("wiki.json", '{"benchmark": "x", "model": "x", "protocol": {"samples": 1}, "metrics": {"a": 3}}', "is no result of textldm"),
        ("sweep.json", '{"points": [], "pareto": []}', "is no result of textldm evaluate sweep"),
        ("sweep.json", json.dumps(sweep() | {"pareto": [3]}), "is no result of textldm evaluate sweep"),
        ("sweep.json", json.dumps(sweep() | {"by": "bertscore"}), "is no result of textldm evaluate sweep"),
        ("checkpoints/step-000000200/manifest.json", "{}", "cannot be read"),
        ("../data/manifest.json", "{}", "manifest.json"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    run = write_run(tmp_path)
    (run / name).write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_run(run)
    assert "\n" not in str(raised.value)


def test_other_json_in_the_folder_is_nobodys_business(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "a.json").write_text("{")
    (run / "b.json").write_text("[1]")
    (run / "c.json").write_text('{"metrics": 3}')
    assert len(read_run(run).evaluations) == 1


def test_files_that_are_named_must_be_there(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "more.json").write_text(json.dumps(evaluation("gpt2")))
    assert [result["model"] for result in read_run(run, None, [tmp_path / "more.json"]).evaluations] == ["x", "gpt2"]
    with pytest.raises(UserError, match="no result of textldm evaluate"):
        read_run(run, None, [tmp_path / "none.json"])
    with pytest.raises(UserError, match="is not a trajectory"):
        read_trajectory(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"has no config\.json; expected the folder of a training run"):
        read_run(tmp_path / "none")


def test_data_that_the_run_was_not_trained_on_is_not_shown_as_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (tmp_path / "data" / "manifest.json").write_text(data_manifest("x").model_dump_json().replace("1190", "1191"))
    assert read_run(run).data is not None  # statistics inform
    save_checkpoint(run, 300, {"data_fingerprint": "0" * 64})
    found = read_run(run)
    assert found.data is None
    assert "holds other data" in found.data_note


def test_a_vae_that_has_gone_on_is_not_shown_as_the_one_beneath(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    save_checkpoint(run, 300, {"inputs": {"model.vae": "0" * 64}})
    found = read_run(run)
    assert found.vae is None
    assert "has gone on, or is another run" in found.vae_note


def test_data_behind_a_url_is_not_asked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["data"]["path"] = "https://example.com/data"
    (run / "config.json").write_text(json.dumps(config))
    assert "not on this machine" in read_run(run).data_note


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, -(10**400), 1e101, [1]])
def test_what_cannot_be_drawn_is_no_number(value: object) -> None:
    assert number(value) is None


def test_a_configuration_flat() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [1, None]}) == {"a.b": "1", "a.c": "{}", "d": "[1, null]"}
