"""A stage from outside: one module and one entry point; trained, resumed, diagnosed and exported by the commands as ours are."""

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.read import read_tensors
from pretrain.telemetry.sinks import read_metrics
from tests.data_pipeline.made_batches import make_batch
from tests.pretrain import tiny_pipeline, tiny_run

ROOT = Path(__file__).resolve().parents[3]

TOY = '''
"""Every token predicted from the one before it, with the unigram's logits, measured beforehand, as a frozen prior."""

import json
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from data_pipeline.core.settings import Section
from data_pipeline.reading.batch import FILLER, PREFIX, SUFFIX
from data_pipeline.text.detokenizer import Detokenizer
from modeling.attention import Segments
from modeling.token_transformer import causal_inputs
from pretrain.checkpoint.read import read_tensors
from pretrain.config.registry import StageKind
from pretrain.config.schema import RunConfig
from pretrain.diagnose.diagnosis import Diagnosis, heldout
from pretrain.diagnose.model_checks import heldout_metrics
from pretrain.diagnose.verdicts import at_most
from pretrain.export.parts import Exported
from pretrain.stages.base import Stage, StageOutput
from pretrain.stages.rows import training_batches


class ToyModel(Section):
    """The table."""

    smoothing: float = 1.0
    """Added to every count."""


class ToyRun(RunConfig):
    """A run of this stage."""

    stage: Literal["toy"]
    """Which model is trained."""
    model: ToyModel = ToyModel()


class ToyStage(Stage):
    def __init__(self, config, manifest, device):
        super().__init__()
        self.config = config
        size = manifest.tokenizer.vocab_size
        counts_V = torch.tensor(json.loads((config.run_folder / "counts.json").read_text()))
        self.register_buffer("prior_V", (counts_V + config.model.smoothing).log_softmax(0))
        self.table = nn.Embedding(size, size)

    def token_counts(self, batch):
        return {"tokens": batch.num_tokens(PREFIX, SUFFIX)}

    def flops(self, batch):
        return 2.0 * self.table.weight.shape[1] * len(batch.tokens_T)

    def forward(self, batch, counts):
        windows = Segments.from_lengths(batch.window_lengths, batch.tokens_T.device)
        logits_TV = self.table(causal_inputs(batch.tokens_T, windows, 0)) + self.prior_V
        real_T = (batch.roles_T != FILLER).float()
        loss = (F.cross_entropy(logits_TV, batch.tokens_T, reduction="none") * real_T).sum()
        return StageOutput(loss / counts["tokens"], {"nats": torch.stack((loss.detach(), real_T.sum()))})


def inputs(config):
    return {"model.smoothing": str(config.model.smoothing)}


def measure(config, manifest, device, together):
    path = config.run_folder / "counts.json"
    if together.rank == 0 and not path.exists():
        tokens = torch.cat([batch.tokens_T for batch in training_batches(config, 8)])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tokens.bincount(minlength=manifest.tokenizer.vocab_size).tolist()))


def samples(occasion):
    stage = occasion.stage
    best = occasion.call(lambda: (stage.table.weight + stage.prior_V).argmax(-1))[:3]
    return [{"after each of the first tokens": Detokenizer(occasion.config.data.path, occasion.manifest).texts([best.tolist()])[0]}]


def figures(stage, device):
    return {"nats": heldout_metrics(stage, heldout(stage.config, device))["nats"]}


def judge(figures, config):
    return [at_most(1, "nats per token", figures["nats"], 100.0)]


def draw_nats(axes, figures):
    axes.bar(["nats"], [figures["nats"]])


DIAGNOSIS = Diagnosis(figures, judge, lambda figures: [draw_nats])


class ToyConfig(PretrainedConfig):
    model_type = "toy"


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)


ToyForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def export(source):
    with torch.device("meta"):
        model = ToyForCausalLM(ToyConfig(vocab_size=source.manifest.tokenizer.vocab_size))
    return Exported(model, source.tensors().__getitem__, source.card("# {name} {settings}", model))


KIND = StageKind(
    config=ToyRun, stage="toy_stage:ToyStage", inputs="toy_stage:inputs", measure="toy_stage:measure",
    samples="toy_stage:samples", diagnosis="toy_stage:DIAGNOSIS", export="toy_stage:export",
)
'''

OTHERS = """
    from pretrain.__main__ import main

    assert main(["train", "--config", "toy.json"]) == 0
    assert main(["train", "--config", "toy.json", "--set", "model.smoothing=2"]) == 2
    assert main(["diagnose", "--run", "run"]) == 0
    for _ in range(2):  # an export makes room for another
        assert not main(["convert", "--run", "run", "--output", "export"])
"""
"""The commands that need no process of their own: a start takes five seconds."""


def test_the_documented_stage_sees_neither_packing_nor_micro_batches() -> None:
    (code,) = re.findall(
        r"```python\n(# my_package/mine\.py\n.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL
    )
    exec(compile(code, "mine.py", "exec"), found := {"__name__": "mine"})
    config = SimpleNamespace(model=found["MyModel"]())
    manifest = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=20))
    stage = found["MyStage"](config, manifest, torch.device("cpu")).double()
    rows = [make_batch([(0, 20), (3, 30)], seed) for seed in range(3)]
    joined = ("window_lengths", "segment_lengths", "segment_roles")
    together = replace(
        rows[0],
        tokens_T=torch.cat([row.tokens_T for row in rows]),
        **{name: [value for row in rows for value in getattr(row, name)] for name in joined},
    )
    counts = {"tokens": stage.token_counts(together)["tokens"]}
    assert counts["tokens"] == 3 * 53 == sum(stage.token_counts(row)["tokens"] for row in rows)
    for training in (True, False):
        stage.train(training)
        assert float(stage(together, counts).loss.detach()) == pytest.approx(
            sum(float(stage(row, counts).loss.detach()) for row in rows), rel=1e-12
        )


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with the installed package and its data, and nothing of ours changed."""
    site = tmp_path / "site"
    (site / "toy-1.0.dist-info").mkdir(parents=True)
    (site / "toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
    (site / "toy-1.0.dist-info" / "entry_points.txt").write_text("[textldm.stages]\ntoy = toy_stage:KIND\n")
    (site / "toy_stage.py").write_text(TOY)
    tiny_pipeline.write_data(tmp_path / "data")
    values = tiny_run.config_values(tmp_path / "data", tmp_path / "run", steps=4, eval_every=2)
    values |= {"stage": "toy", "model": {"smoothing": 0.5}, "schedule": {"kind": "constant"}}
    del values["repa"]
    tiny_run.write_config(tmp_path / "toy.json", values)
    return tmp_path


def command(toy: Path, *arguments: str) -> str:
    """What Python prints, with the package on the path."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"PYTHONPATH": f"{toy / 'site'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=toy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_stage_from_outside_is_trained_resumed_diagnosed_and_exported(toy: Path) -> None:
    run, train = toy / "run", (str(ROOT / "pretrain" / "train.py"), "--config", "toy.json")
    assert "stage toy in" in command(toy, *train, "--set", "train.steps=2")
    counts = (run / "counts.json").read_bytes()
    said = command(toy, "-c", textwrap.dedent(OTHERS))
    assert "resuming" in said
    assert (run / "counts.json").read_bytes() == counts
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert [line["step"] for line in read_metrics(run, "sample")] == [2, 4]
    assert "model.smoothing was 0.5, is 2" in said  # a key of the configuration and, to this stage, an input
    assert "GO: all 1 thresholds met" in said
    nats = json.loads((run / "diagnosis.json").read_text())["nats"]
    assert nats == pytest.approx(read_metrics(run, "eval")[-1]["eval/nats"], rel=0.05)
    exported = load_file(toy / "export" / "model.safetensors")
    assert torch.equal(exported["table.weight"], read_tensors(run, "ema")["table.weight"])
    config = json.loads((toy / "export" / "config.json").read_text())
    assert config["textldm_stage"] == "toy"
    assert config["auto_map"]["AutoModelForCausalLM"] == "toy_stage.ToyForCausalLM"
    assert '"smoothing": 0.5' in (toy / "export" / "README.md").read_text()
    assert {"README.md", "tokenizer.json"} <= {path.name for path in (toy / "export").iterdir()}
