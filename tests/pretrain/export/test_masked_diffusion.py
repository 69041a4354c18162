"""Masked diffusion's export, by whoever has torch and transformers alone."""

import json
from pathlib import Path

import pytest

from modeling.textmdlm import TextMDLM
from pretrain.export.convert import convert
from tests.pretrain.conftest import Trained
from tests.pretrain.evaluate.token_runs import train
from tests.pretrain.export import bare

OUTSIDE = """
    import json, sys

    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline

    load = {"trust_remote_code": True}
    model, report = AutoModelForMaskedLM.from_pretrained(sys.argv[1], output_loading_info=True, **load)
    assert not any(report.values()), report
    assert type(model) is type(AutoModel.from_pretrained(sys.argv[1], **load))
    assert type(model) is type(AutoModelForCausalLM.from_pretrained(sys.argv[1], **load))
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], **load)
    inputs = tokenizer(["w3 w4 w5", "w9"], padding=True, return_tensors="pt")
    assert model(**inputs).logits.shape == (2, 3, model.mask_token_id)
    (one,) = pipeline("text-generation", model=sys.argv[1], **load)("w3 w4", max_new_tokens=5, return_full_text=False)
    model.save_pretrained(sys.argv[2])
    saved = AutoModelForMaskedLM.from_pretrained(sys.argv[2], **load)
    found = {"tokens": saved.generate(**inputs, max_new_tokens=6, seed=3, eos_token_id=-1).tolist(), "pipeline": one["generated_text"]}
    found["alone"] = tokenizer.decode(model.generate([[3, 4]], 5)[0])
    print(json.dumps(found | {"nats": model.nll([[3, 4]], [[5, 6, 7]], seed=1).tolist()}))
"""


@pytest.mark.slow
def test_it_needs_nothing_of_our_repository(trained: Trained, tmp_path: Path) -> None:
    output = convert(train("mdlm", trained.data, tmp_path), tmp_path / "mdlm-1.0")
    found = json.loads(bare.run(OUTSIDE, output, tmp_path / "saved.2", folder=tmp_path).splitlines()[-1])
    model = TextMDLM.from_pretrained(output)
    expected = model.generate([[3, 4, 5], [9]], 6, seed=3, eos_token_id=-1)
    assert [row[:3] for row in found["tokens"]] == [[3, 4, 5], [0, 0, 9]]
    assert [row[3:] for row in found["tokens"]] == [ids.tolist() for ids in expected]
    assert found["pipeline"].split() == found["alone"].split()
    assert found["nats"] == pytest.approx(model.nll([[3, 4]], [[5, 6, 7]], seed=1).tolist(), rel=1e-5)
    assert "AutoModelForCausalLM" in (output / "README.md").read_text()
