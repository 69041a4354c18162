"""The baselines over tokens, trained in miniature by the public code: what they report, write, are diagnosed and exported as."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import SUFFIX, Batch
from modeling.textmdlm import TextMDLM
from pretrain.checkpoint.find import checkpoint_of
from pretrain.diagnose import __main__ as diagnose
from pretrain.diagnose.tokens import target_tokens
from pretrain.export.convert import main as convert
from pretrain.runs.folder import config_of
from pretrain.stages.ar import ARStage
from pretrain.stages.build import load_stage
from pretrain.stages.rows import heldout_rows
from pretrain.stages.token_stage import TokenStage
from pretrain.telemetry.sinks import read_metrics
from tests.pretrain import tiny_pipeline, tiny_run

QUICK = ["--rows", "8", "--num-steps", "3", "--set", "diagnose.sample_tokens=64"]


def values_of(stage: str, data: Path, run: Path, **train: object) -> dict:
    values = tiny_run.config_values(data, run, **({"steps": 4, "eval_every": 4, "eval_samples": 2} | train))
    values |= {"stage": stage, "model": {"width": 32, "num_layers": 2, "head_dim": 16}}
    values["data"]["split"] = {"kind": "context", "min_tokens": 2}
    del values["repa"]
    return values


@pytest.fixture(scope="module", params=["ar", "mdlm"])
def run(request: pytest.FixtureRequest, trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of either stage, four steps."""
    folder = tmp_path_factory.mktemp(request.param)
    return tiny_pipeline.start(folder, values_of(request.param, trained.data, folder / request.param))


def loaded(run: Path) -> TokenStage:
    return load_stage(config_of(run), checkpoint_of(run), torch.device("cpu"))


def batches_of(stage: TokenStage) -> list[Batch]:
    return list(heldout_rows(stage.config, 10))


def test_an_evaluation_reports_nats_and_writes_texts(run: Path) -> None:
    (evaluation,), samples = read_metrics(run, "eval"), read_metrics(run, "sample")
    stage = loaded(run)
    rows = list(heldout_rows(stage.config, stage.config.train.eval_rows))
    draws = 4
    total = sum(float(stage.window_nats(batch, draws).sum()) for batch in rows)
    nats = total / sum(batch.num_tokens(SUFFIX) for batch in rows)
    assert evaluation["eval/nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert 3.5 < nats < 4.7  # log 63 is 4.14, and the tokens are random
    assert {"context", "generated", "true"} <= samples[-1].keys()
    assert set(samples[-1]["generated"].split()) <= set(tiny_pipeline.WORDS)


def test_what_is_generated_has_the_targets_lengths_and_depends_on_the_seed(run: Path) -> None:
    from data_pipeline.reading.prompts import prompts_of

    stage = loaded(run)
    prompts = prompts_of(batches_of(stage), 100)
    first, again, other = (stage.generate(prompts, 3, seed) for seed in (0, 0, 1))
    assert [len(tokens) for tokens in first] == [len(prompt.target_T) for prompt in prompts]
    assert first == again != other


def test_documents_do_not_depend_on_what_else_is_in_the_batch(run: Path) -> None:
    stage = loaded(run)
    together = torch.cat([stage.window_nats(batch, 2) for batch in heldout_rows(stage.config, 6, micro_batch_rows=3)])
    alone = torch.cat([stage.window_nats(batch, 2) for batch in heldout_rows(stage.config, 6, micro_batch_rows=1)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_diagnosis_compares_with_the_unigram_and_a_foreign_context(run: Path, tmp_path: Path) -> None:
    code = diagnose.main(["--run", str(run), "--output", str(tmp_path), "--device", "cpu", *QUICK])
    record = json.loads((tmp_path / "diagnosis.json").read_text())
    assert code == 1  # random tokens: nothing to be known beyond the unigram
    assert record["unigram_nats"] == pytest.approx(4.14, abs=0.1)
    assert abs(record["nats_per_token"] - record["unigram_nats"]) < 0.5
    assert abs(record["context_nats"]) < 0.2
    failed = {check["name"] for check in record["checks"] if check["passed"] is False}
    assert "nats per token + 2 errors, below the unigram's" in failed
    assert {check["check"] for check in record["checks"]} == {1, 5, 8, 9}
    assert (tmp_path / "diagnosis.png").stat().st_size > 1000


def test_an_export_gives_the_stages_probabilities(run: Path, tmp_path: Path) -> None:
    assert convert(["--run", str(run), "--output", str(tmp_path / "export")]) == 0
    stage = loaded(run)
    if not isinstance(stage, ARStage):
        masked, saved = TextMDLM.from_pretrained(tmp_path / "export"), stage.state_dict()
        assert masked.state_dict().keys() == saved.keys()
        assert all(torch.equal(tensor, saved[name]) for name, tensor in masked.state_dict().items())
        manifest = Manifest.load(stage.config.data.path)
        assert (masked.config.max_window, masked.config.eos_token_id) == (manifest.max_window, 0)
        assert masked.generation_config.max_new_tokens == manifest.max_window // 2
        assert masked.config.textldm_stage == "mdlm"
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert model.config.textldm_stage == "ar"
    start = Manifest.load(stage.config.data.path).tokenizer.eos_id
    batch = batches_of(stage)[0]
    pieces = batch.tokens_T.split(batch.window_lengths)
    roles = batch.roles_T.split(batch.window_lengths)
    found = []
    for tokens_L, roles_L in zip(pieces, roles, strict=True):
        logits_LV = model(input_ids=torch.cat((torch.tensor([start]), tokens_L))[None]).logits[0, :-1]
        nats_L = torch.nn.functional.cross_entropy(logits_LV, tokens_L, reduction="none")
        found.append(float(nats_L[roles_L == SUFFIX].detach().sum()))
    expected_W = stage.window_nats(batch, 1)
    assert expected_W.tolist() == pytest.approx(found, abs=1e-3)
    assert [total > 0 for total in found] == (target_tokens(batch) > 0).tolist()


def test_a_default_of_generate_that_the_export_has_not_is_refused(run: Path, tmp_path: Path, capsys) -> None:
    assert convert(["--run", str(run), "--output", str(tmp_path / "x"), "--num-steps", "9"]) == 2
    assert not (tmp_path / "x").exists()


def test_data_without_an_end_of_text_is_refused_by_the_language_model(tmp_path: Path, capsys) -> None:
    from pretrain import train

    data = tiny_run.write_data(tmp_path / "data")
    config = tiny_run.write_config(tmp_path / "c.json", values_of("ar", data, tmp_path / "run"))
    assert train.main(["--config", str(config)]) == 2
    assert "end-of-text token" in capsys.readouterr().err
