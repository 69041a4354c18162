"""The benchmark of students counts evaluations and compares by the same prompts; here a teacher stands in for its students."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from benchmarks import distilling
from pretrain.export.convert import convert
from pretrain.export.parts import Sampling
from tests.pretrain import tiny_pipeline, tiny_run


def write_judge(folder: Path, tokenizer: Path) -> Path:
    """A causal language model with random weights."""
    torch.manual_seed(0)
    shape = Qwen3Config(
        vocab_size=tiny_run.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def test_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, _, dit = tiny_pipeline.train_both(tmp_path)
    same = convert(dit, tmp_path / "same", sampling=Sampling(num_steps=2, guidance_scale=2.0))
    half = convert(dit, tmp_path / "half", sampling=Sampling(num_steps=2, guidance_scale=1.0))
    judge = write_judge(tmp_path / "judge", data / "tokenizer")
    sizes = ["--prompts", "20", "--prompt-tokens", "8", "--new-tokens", "6", "--teacher-steps", "3", "--device", "cpu"]
    folders = ["--student", str(same), str(half), "--teacher", str(same), "--data", str(data), "--judge", str(judge)]
    assert distilling.main([*folders, *sizes]) in (0, None)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["model"], row["steps"]): row for row in figures["table"]}
    evaluations = {("same", 2): 4, ("half", 2): 2, ("teacher", 2): 4, ("teacher", 3): 6}
    assert {key: row["evaluations"] for key, row in rows.items()} == evaluations
    assert rows["teacher", 3]["agreement"] == 1 > rows["half", 2]["agreement"]
    assert rows["same", 2]["generative_nll"] == rows["teacher", 2]["generative_nll"]
    compared = {(x["student"], x["teacher_evaluations"]): x for x in figures["comparisons"]}
    assert compared.keys() == {(name, n) for name in ("same", "half") for n in (4, 6)}
    assert compared["same", 4]["nll_ratio"] == compared["same", 4]["entropy_ratio"] == [1, 1, 1]
    low, high = compared["half", 6]["nll_ratio"][1:]
    assert low < compared["half", 6]["nll_ratio"][0] < high
    assert distilling.main([*folders, *sizes, "--prompts", "99"]) == 2
    assert "held-out windows of 8 tokens; expected 99" in capsys.readouterr().err


def test_entropy_is_that_of_the_frequencies() -> None:
    counts_NV = distilling.token_counts([[0, 0, 1], [1, 2, 2]])
    assert counts_NV.tolist() == [[2, 1, 0], [0, 1, 2]]
    assert distilling.entropy(np.array([1, 1]), counts_NV) == pytest.approx(np.log(3))
    assert distilling.entropy(np.array([1, 0]), counts_NV) == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
