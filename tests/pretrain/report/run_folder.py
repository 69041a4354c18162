"""A run's folder with all that the report reads, written without training."""

import json
import math
from pathlib import Path
from typing import Any

from data_pipeline.format.manifest import Manifest, ShardInfo, TokenizerInfo
from pretrain.checkpoint.manifest import Manifest as CheckpointManifest
from pretrain.checkpoint.storage import Checkpoint, storage_of
from pretrain.engine.parameter import Parameter

HOSTILE = "</script></style><img src=x onerror=alert(1)>\"'&\u202e\x1b[31m"
NATS = 4.857720357672801


def train_line(step: int, **values: Any) -> dict[str, Any]:
    """A logged step."""
    line = {
        "kind": "train",
        "step": step,
        "loss": 3 + 1 / step,
        "grad_norm": 0.3 + step / 1e4,
        "lr": 0.01 * math.exp(-step / 100),
    }
    line |= {"flow": 0.6 - step / 1e4, "flow_q1": 0.4, "flow_q2": 0.3, "flow_q3": 0.2, "flow_q4": 1.1}
    line |= {
        "tokens_per_s": 2100.0 + step,
        "tokens_per_s_per_device": 1050.0,
        "wait_share": 0.001,
        "goodput": 0.98,
        "skipped": 0,
    }
    return line | {"peak_memory_gib": 0.7, "step_s": 0.5, "time": 1.7e9 + step} | values


def metrics(word: str = "made") -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: 200 steps, two evaluations with two texts each."""
    lines: list[dict[str, Any]] = [{"kind": "event", "event": "start", "step": 0, "ranks": 2, "time": 1.7e9}]
    for step in range(10, 210, 10):
        lines.append(train_line(step))
        if step % 100 == 0:
            figures = {
                "eval/nats": 5.5 - step / 400,
                "eval/unigram_nats": 5.758885405692838,
                "eval/flow": 0.55,
                "eval/flow_q1": 0.41,
            }
            figures |= {"eval/blind_floor_q1": 1.3, "eval/covariance_floor_q1": 0.9}
            lines.append({"kind": "eval", "step": step, "seconds": 1.0, **figures, "time": 1.7e9 + step})
            for context in ("once", "twice"):
                texts = {"context": context, "generated": f"{word} {context} {step}", "true": f"true {context}"}
                lines.append({"kind": "sample", "step": step, **texts, "time": 1.7e9 + step})
    lines.append({"kind": "event", "event": "checkpoint", "step": 200, "stalled_s": 0.25, "time": 1.7e9 + 201})
    return lines


def diagnosis(name: str = "real words") -> dict[str, Any]:
    """What textldm diagnose writes, in short."""
    return {
        "run": "runs/x", "stage": "dit", "step": 200, "verdict": "go",
        "nats_per_token": NATS, "nats_per_token_error": 0.05138786765678644,
        "unigram_nats": 5.758885405692838, "teacher_nats": 4.518682421702122,
        "context_nats": 0.019186082469274238, "context_nats_error": 0.0033761261077424736,
        "nats_times": [0.3, 0.6, 1.0], "nats_curve": [4.9, 4.8, 5.78],
        "noise_levels": [0.0, 0.5, 1.0], "accuracy_at_noise": [0.998, 0.99, 0.97],
        "checks": [
            {"check": 8, "name": name, "figure": "0.912", "threshold": ">= 0.8", "passed": True},
            {"check": 9, "name": "copied", "figure": "0.300", "threshold": "<= 0.1", "passed": False},
            {"check": 1, "name": "nats", "figure": "4.8577 +- 0.0514", "threshold": "", "passed": None},
        ],
    }  # fmt: skip


def evaluation(model: str = "export/x", benchmark: str = "wikipedia") -> dict[str, Any]:
    """What textldm evaluate writes, in short."""
    figures = {"rouge_2": {"value": 0.0312345, "low": 0.03, "high": 0.033, "n": 50}}
    figures["nats_per_token"] = {"value": 4.8612345, "low": None, "high": None, "n": 50}
    return {
        "model": model, "kind": "textldm", "benchmark": benchmark, "metrics": figures, "left_out": {"mauve": f"{model} is missing"},
        "protocol": {"samples": 50, "seed": 0, "max_words": 700, "judge": model}, "versions": {"torch": "2.13.0"},
    }  # fmt: skip


def sweep(benchmark: str = "wikipedia") -> dict[str, Any]:
    """What textldm evaluate sweep writes, in short: of three points two are not beaten."""
    points = [
        {
            "settings": {"num_steps": steps, "solver": benchmark},
            "evaluations": 2 * steps,
            "metrics": {"rouge_2": {"value": value, "low": value - 0.001, "high": value + 0.001, "n": 50}},
        }
        for steps, value in ((8, 0.0212345), (16, 0.0198765), (32, 0.0287654))
    ]
    return {
        "model": "export/x",
        "benchmark": benchmark,
        "by": "rouge_2",
        "pareto": [0, 2],
        "best": points[2]["settings"],
        "points": points,
    }


def data_manifest(source: str = "bible") -> Manifest:
    """Of two shards."""
    tokenizer = TokenizerInfo(name=source, revision=None, sha256="1" * 64, vocab_size=4096, special_ids={}, eos_id=0)
    shards = [
        ShardInfo(name=f"train-0000{i}.tar", rows=40, windows=98, tokens=20_470, bytes=133_120, sha256="2" * 64)
        for i in (0, 1)
    ]
    return Manifest.create(
        row_tokens=512, token_dtype="uint16", min_window=16, max_window=256, seed=0, heldout_fraction=0.02, dedupe=False,
        tokenizer=tokenizer, splits={"train": shards, "heldout": []}, source=source, statistics={"documents": 1190},
    )  # fmt: skip


def save_checkpoint(run: Path, step: int, extra: dict[str, Any]) -> CheckpointManifest:
    """The manifest of a checkpoint: all of it that the report looks at."""
    parameters = {
        "dit.weight": Parameter((192, 128), True, ("weight",)),
        "dit.bias": Parameter((192,), False, ("weight",)),
    }
    saved = CheckpointManifest(
        step, step, 2, 1, "fp32", parameters, {}, {}, extra, {"python": "3.11.2", "torch": "2.13.0"},
        checkpoint=Checkpoint(storage_of(run), f"step-{step:09d}"),
    )  # fmt: skip
    saved.save(saved.checkpoint)
    return saved


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """A JSON object a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder: Path, text: str = "x", **settings: Any) -> Path:
    """A run <folder>/run of stage dit with everything, its data and VAE beside it; `text` stands wherever text from outside may."""
    run, vae, data = folder / "run", folder / "vae", folder / "data"
    for path in (run, vae, data):
        path.mkdir(parents=True)
    manifest = data_manifest(text)
    (data / "manifest.json").write_text(manifest.model_dump_json())
    below = save_checkpoint(vae, 50, {})
    write_lines(
        vae / "metrics.jsonl",
        [{"kind": "train", "step": step, "ce": 9 / step, "token_accuracy": 0.9} for step in range(1, 50)],
    )
    config = {
        "stage": "dit", "about": {"purpose": text}, "data": {"path": "elsewhere/data", "rows_per_step": 2},
        "train": {"steps": 200, "seed": 0, text: text}, "model": {"vae": "elsewhere/vae"}, **settings,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    lines = metrics(text)
    lines.insert(1, {"kind": "event", "event": text, "step": 0, text: text, "time": 1.7e9})
    lines.insert(2, train_line(5, **{text: 1.0}))
    write_lines(run / "metrics.jsonl", lines)
    (run / "diagnosis.json").write_text(json.dumps(diagnosis(text)))
    way = [{"t": 1.0, "text": f"the {text} the"}, {"t": 0.5, "text": f"the {text}"}, {"t": 0.0, "text": f"a {text}"}]
    (run / "trajectory.json").write_text(json.dumps(way))
    (run / "wiki.json").write_text(json.dumps(evaluation(text, text)))
    (run / "sweep.json").write_text(json.dumps(sweep(text)))
    recorded = {
        "data_fingerprint": manifest.fingerprint,
        "inputs": {"model.vae": below.fingerprint},
        "commit": f"1a2b3c4{text}",
    }
    save_checkpoint(run, 200, recorded)
    return run
