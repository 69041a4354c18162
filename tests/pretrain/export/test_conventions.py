"""What transformers' users expect of a folder, where there is nothing but torch, transformers and accelerate."""

import json
import shutil
from pathlib import Path

import pytest

from tests.pretrain.export import bare

OUTSIDE = """
    import importlib.util, json, socket, sys, warnings

    for name in ("modeling", "pretrain", "data_pipeline", "deepspeed", "webdataset", "pytest", "scipy"):
        assert importlib.util.find_spec(name) is None, name

    def refused(*_):
        raise OSError("offline")

    socket.socket.connect = refused
    import torch
    from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer, pipeline)

    first, second, third = sys.argv[1:]
    load = {"trust_remote_code": True}
    model = AutoModelForCausalLM.from_pretrained(first, **load)
    tokenizer = AutoTokenizer.from_pretrained(first, **load)
    texts = ["w3 w4 w5 w6", "w9"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]], inputs
    found = {"left": model.generate(**inputs, max_new_tokens=6, seed=3, eos_token_id=-1).tolist()}
    tokenizer.padding_side = "right"
    right = tokenizer(texts, padding=True, return_tensors="pt")
    found["right"] = model.generate(**right, max_new_tokens=6, seed=3, eos_token_id=-1).tolist()
    found["config"] = model.generation_config.to_diff_dict()

    # A pipeline, of an empty prompt too, and its batches.
    pipe = pipeline("text-generation", model=first, trust_remote_code=True)
    (one,) = pipe("w3 w4", max_new_tokens=5, return_full_text=False)
    found["pipeline"] = one["generated_text"]
    found["alone"] = tokenizer.decode(model.generate([[3, 4]], 5)[0])
    assert [len(many) for many in pipe(texts, max_new_tokens=4, num_return_sequences=2, batch_size=2)] == [2, 2]
    assert pipe("")[0]["generated_text"].count("w") <= model.generation_config.max_new_tokens
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, generation_config=GenerationConfig(max_new_tokens=2, num_steps=3))
    assert len(tokenizer(pipe("w3", return_full_text=False)[0]["generated_text"]).input_ids) <= 2

    # A streamer prints the same.
    model.generate(**tokenizer(["w7"], return_tensors="pt"), max_new_tokens=3, streamer=TextStreamer(tokenizer))

    # Other folders in the same process: one of the same name with other code, one that was saved from here.
    other = AutoModel.from_pretrained(second, **load)
    assert other.is_the_other and not hasattr(model, "is_the_other"), type(other)
    again = AutoModelForCausalLM.from_pretrained(first, **load)
    assert not hasattr(again, "is_the_other")
    model.generation_config.num_steps = 7
    model.save_pretrained(third)
    saved = AutoModelForCausalLM.from_pretrained(third, **load)
    assert saved.generation_config.num_steps == 7 and model.config.num_steps == 50
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values()))
    ids = {"input_ids": inputs["input_ids"], "max_new_tokens": 4}
    assert torch.equal(saved.generate(**ids), model.generate(**ids))

    # Without weights, in another precision, placed by accelerate, compiled.
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(first, **load), **load)
    assert fresh.generate(**ids, eos_token_id=-1).shape == (2, 8)  # random weights may well say that the text ends
    half = AutoModelForCausalLM.from_pretrained(first, dtype=torch.bfloat16, device_map="auto", **load)
    assert half.dtype == torch.bfloat16 and half.vae.latents_std.dtype == torch.float32
    assert half.generate(**ids).shape == (2, 8)
    compiled = torch.compile(again, backend="eager")
    assert torch.equal(compiled.generate(**ids), again.generate(**ids))
    again.dit.compile(backend="eager")
    model.generation_config.num_steps = again.generation_config.num_steps
    assert torch.equal(again.generate(**ids, num_steps=2), model.generate(**ids, num_steps=2))
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_folder_serves_transformers_users_without_our_repository_and_offline(exported: Path, tmp_path: Path) -> None:
    """Read-only, in folders whose names have dots and hyphens, two of them with one name."""
    first = Path(shutil.copytree(exported, tmp_path / "a" / "textldm-1.5-tiny.v2"))
    second = Path(shutil.copytree(exported, tmp_path / "b" / "textldm-1.5-tiny.v2"))
    code = second / "textldm.py"
    code.write_text(
        code.read_text().replace("    config: TextLDMConfig\n", "    config: TextLDMConfig\n    is_the_other = True\n")
    )
    for folder in (first, second):
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
    *streamed, last = bare.run(OUTSIDE, first, second, tmp_path / "saved.2", folder=tmp_path).splitlines()
    found = json.loads(last)
    left, right = found["left"], found["right"]
    assert [row[:4] for row in left] == [[3, 4, 5, 6], [0, 0, 0, 9]]
    assert [row[:4] for row in right] == [[3, 4, 5, 6], [9, 0, 0, 0]]
    assert [row[4:] for row in left] == [row[4:] for row in right]
    assert all(len(row) == 10 for row in left)
    assert found["pipeline"].split() == found["alone"].split()
    assert streamed[0].startswith("w7")
    for name, value in {
        "num_steps": 50,
        "guidance_scale": 7.0,
        "solver": "euler",
        "grid": "training",
        "eos_token_id": 0,
        "pad_token_id": 0,
    }.items():
        assert found["config"][name] == value
