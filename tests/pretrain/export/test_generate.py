"""The generate command: what it prints, what it writes, and its messages."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.core.errors import UserError
from modeling.textldm import TextLDM
from modeling.times import TimeDistribution
from pretrain.export.generate import Options, continue_prompts, load_exported, main, read_prompts


def start(capsys: pytest.CaptureFixture[str], exported: Path, *arguments: str) -> str:
    """What the command printed."""
    assert main(["--model", str(exported), *arguments]) == 0
    return capsys.readouterr().out


def test_prints_prompt_and_continuation(exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("w7 w8\n\n  \nw9\n")
    options = ["--max-new-tokens", "6", "--num-steps", "5", "--guidance-scale", "2", "--solver", "heun", "--seed", "3"]
    given = ["--prompt", "w3 w4 w5", "--prompt", "", "--prompt-file", str(file), *options]
    lines = [json.loads(line) for line in start(capsys, exported, *given, "--json").splitlines()]
    assert [line["prompt"] for line in lines] == ["w3 w4 w5", "", "w7 w8", "w9"]
    assert [line["num_prompt_tokens"] for line in lines] == [3, 0, 2, 1]

    model = TextLDM.from_pretrained(exported)
    ids = [[3, 4, 5], [], [7, 8], [9]]
    expected = model.generate(ids, 6, num_steps=5, guidance_scale=2.0, solver="heun", seed=3)
    assert [line["num_new_tokens"] for line in lines] == [len(new) for new in expected]
    assert [line["continuation"].split() for line in lines] == [[f"w{i}" for i in new.tolist()] for new in expected]

    text = start(capsys, exported, *given)
    for line in lines:
        assert f"[{line['num_prompt_tokens']} tokens] {line['prompt']}" in text
        assert f"[+{line['num_new_tokens']} tokens] {line['continuation']}" in text


def test_without_a_length_the_window_is_filled(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(start(capsys, exported, "--prompt", "w3 " * 20, "--num-steps", "2", "--json"))
    model, tokenizer = load_exported(exported)
    whole = model.generate([[3] * 20], model.config.max_window - 20, num_steps=2)[0]
    assert found["continuation"] == tokenizer.decode(whole)


def test_beyond_the_window_it_goes_on_in_blocks(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_exported(exported)
    for given, prompt, new in ((["--max-new-tokens", "40"], [3, 4], 40), ([], [3] * 40, 128)):
        text = " ".join(f"w{i}" for i in prompt)
        found = json.loads(start(capsys, exported, "--prompt", text, "--num-steps", "2", "--json", *given))
        assert found["continuation"] == tokenizer.decode(model.generate([prompt], new, num_steps=2)[0])
        assert found["num_prompt_tokens"] == len(prompt)


def test_the_trajectory_is_the_first_prompts_way(
    exported: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "made" / "way.json"
    given = ["--prompt", "w3 w4", "--prompt", "w5", "--max-new-tokens", "8", "--num-steps", "20", "--json"]
    printed = json.loads(start(capsys, exported, *given, "--trajectory", str(path)).splitlines()[0])
    stages = json.loads(path.read_text())
    times = [stage["t"] for stage in stages]
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, 9)
    assert times == sorted(set(times), reverse=True)
    assert set(times) <= set(TimeDistribution(std=1.2).grid(20).tolist())
    assert stages[-1]["text"] == printed["continuation"]
    assert all(stage["text"] for stage in stages[:-1])
    few = tmp_path / "few.json"
    start(capsys, exported, *given, "--num-steps", "2", "--trajectory", str(few))
    assert [stage["t"] for stage in json.loads(few.read_text())] == [1.0, 0.5, 0.0]


def test_text_that_looks_special_is_text(exported: Path) -> None:
    model, tokenizer = load_exported(exported)
    (found,) = continue_prompts(model, tokenizer, ["w3 <|endoftext|>x"], Options(max_new_tokens=2, num_steps=1))
    assert found.num_prompt_tokens == 2


def test_mistakes_are_one_line(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, b"")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    prompt = ["--prompt", "w3"]
    for model, arguments, message in (
        (exported, [], "nothing to continue"),
        (exported, ["--prompt-file", str(tmp_path / "none.txt")], "none.txt cannot be read"),
        (exported, [*prompt, "--max-new-tokens", "0"], "--max-new-tokens is 0; expected at least 1"),
        (exported, [*prompt, "--seed", "-1"], "seed is -1; expected 0 to"),
        (exported, [*prompt, "--num-steps", "-1"], "--num-steps is -1; expected at least 1"),
        (exported, [*prompt, "--device", "gpu"], "--device is gpu ("),
        (exported, [*prompt, "--num-steps", "1", "--trajectory", str(exported)], "cannot be written"),
        (tmp_path / "none", prompt, "no such folder"),
        (tmp_path, prompt, "has no config.json"),
        (tmp_path / "other", prompt, "holds a model of type llama"),
    ):
        assert main(["--model", str(model), *arguments]) == 2, message
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors


def test_weights_that_do_not_fit_are_refused(exported: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(exported, tmp_path / "x"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["dit.from_latent.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit its config\.json.*dit\.from_latent\.weight"):
        load_exported(folder)
    tensors["dit.from_latent.weight"] = torch.zeros(7, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be loaded|do not fit"):
        load_exported(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_exported(folder)


def test_prompts_of_the_command_line_come_first(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("b\nc\n")
    assert read_prompts(["a"], str(tmp_path / "p.txt")) == ["a", "b", "c"]


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\f", "\v", "\x1c", "\x85", "\r"])
def test_a_line_is_what_a_line_feed_ends(separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = f"\ufeffa{separator}b\n \t\n\r\nc\r\n{separator}d\ufeff".encode()
    (tmp_path / "p.txt").write_bytes(content)
    expected = [f"a{separator}b", "c", f"{separator}d\ufeff"]
    assert read_prompts([], str(tmp_path / "p.txt")) == expected
    piped(monkeypatch, content)
    assert read_prompts([], "-") == expected
    piped(monkeypatch, content)
    assert read_prompts([], None) == expected
    piped(monkeypatch, content)
    assert read_prompts(["x"], None) == ["x"]  # what is piped in is not meant where there is something else


def test_bytes_that_are_no_text_are_named_by_line_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes(b"one\ntw\xe9\n")
    with pytest.raises(UserError, match=r"p\.txt, line 2: byte 3 \(0xe9\) is not UTF-8"):
        read_prompts([], str(file))
    piped(monkeypatch, b"caf\xe9")
    with pytest.raises(UserError, match="the standard input, line 1: byte 4"):
        read_prompts([], None)
    assert main(["--model", "x", "--prompt", os.fsdecode(b"caf\xe9")]) == 2
    assert capsys.readouterr().err.startswith(r"error: --prompt: b'caf\xe9' is not UTF-8")
