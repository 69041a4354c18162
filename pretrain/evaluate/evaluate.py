"""From a model and a text to figures."""

import argparse
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.errors import UserError
from data_pipeline.core.telling import printable
from data_pipeline.format.manifest import Manifest
from data_pipeline.text.detokenizer import Detokenizer
from pretrain.diagnose import text_checks
from pretrain.evaluate import featurizers
from pretrain.evaluate.bootstrap import COVERAGE, RESAMPLINGS, Interval, ratio_of_sums
from pretrain.evaluate.command_line import Judges
from pretrain.evaluate.metrics import PLAIN, Judged
from pretrain.evaluate.records import Record, Work
from pretrain.evaluate.samples import CUT, Drawn
from pretrain.evaluate.subjects import Subject

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "rouge-score", "bert-score", "mauve-text")
Metrics = dict[str, Interval]


def identity(model: str) -> list[Any]:
    """What tells a folder's contents from those of another time: its files' names, sizes and times of change; a hub id's own name."""
    if not Path(model).is_dir():
        return [model]
    files = sorted(
        path for path in Path(model).rglob("*") if path.is_file() and path.suffix in (".safetensors", ".json", ".bin")
    )
    return [[str(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def work_of(args: argparse.Namespace, drawn: Drawn, subject: Subject | None) -> tuple[Work, dict[str, Any]]:
    """What is to be written under the arguments of `command_line.add_task`, and all settings that it follows from."""
    work = Work(drawn.samples, subject, args.model, args.seed, args.batch_size)
    settings = {
        "model": args.model,
        "model_files": identity(args.model),
        "kind": subject.kind if subject else args.model,
        "sampling": subject.sampling if subject else {},
        "benchmark": args.benchmark,
        "documents": [sample.key for sample in drawn.samples],
        "seed": args.seed,
        "max_words": args.max_words,
        "batch_size": args.batch_size,
        "exact": subject.exact if subject else None,
    }
    return work, settings


def figures(
    judged: Judged, judges: Judges, data: str | None, data_rows: int, seed: int, device: torch.device
) -> tuple[Metrics, dict[str, str], dict[str, Any]]:
    """Metrics, those that are left out with the reason, and what the judges were."""
    found: Metrics = {}
    left_out: dict[str, str] = {}
    protocol: dict[str, Any] = {}
    for metric in PLAIN:
        try:
            found |= metric(judged)
        except ModuleNotFoundError as error:
            left_out[metric.__name__] = f"package {error.name} is missing: pip install 'textldm[eval]'"

    def judge(name: str, measure: Callable[[], Metrics]) -> None:
        try:
            found.update(measure())
        except ModuleNotFoundError as error:
            left_out[name] = f"package {error.name} is missing: pip install 'textldm[eval]'"
        except UserError as error:
            left_out[name] = str(error)

    def measured_mauve() -> Metrics:
        metrics, buckets = featurizers.mauve(judged, judges.mauve, judges.mauve_buckets, seed, device)
        protocol["mauve"] = {"model": judges.mauve, "buckets": buckets}
        return metrics

    def measured_bertscore() -> Metrics:
        metrics, layer = featurizers.bert_score(judged, judges.bert, judges.bert_layer, device)
        protocol["bertscore"] = {"model": judges.bert, "layer": layer}
        return metrics

    judge("bertscore", measured_bertscore)
    judge("mauve", measured_mauve)
    judge("generative_nll", lambda: featurizers.judge_nats(judged, judges.judge, device))
    if "generative_nll" in found:
        protocol["judge"] = judges.judge
    if data is None:
        left_out["copied_from_training"] = "--data does not say which text the model was trained on"
    else:
        judge("copied_from_training", lambda: overlap(judged, data, data_rows))
        protocol["data"] = {"fingerprint": Manifest.load(data).fingerprint, "rows": data_rows}
    return found, left_out, protocol


def overlap(judged: Judged, data: str, max_rows: int) -> Metrics:
    """`copied_from_training`: share of six-word sequences that the training rows hold; `real_words`: of words that they hold.

    Raises: UserError.
    """
    manifest = Manifest.load(data)
    texts = [text_checks.words(text) for text in judged.continuations()]
    wanted = {gram for text in texts for gram in text_checks.ngrams(text, text_checks.COPY_WORDS)}
    rows = min(max_rows, sum(shard.rows for shard in manifest.splits["train"]))
    training = text_checks.TrainingText.read(data, manifest, Detokenizer(data, manifest), wanted, rows)
    shares = {
        "copied_from_training": text_checks.copied(texts, training.found),
        "real_words": text_checks.real_words(texts, training.words),
    }
    return {name: ratio_of_sums(share.hits, share.counts) for name, share in shares.items() if any(share.counts)}


def result(
    settings: dict[str, Any], drawn: Drawn, metrics: Metrics, left_out: dict[str, str], protocol: dict[str, Any]
) -> dict[str, Any]:
    """What goes into the file of `--output`."""
    return {
        "model": printable(settings["model"]),
        "kind": settings["kind"],
        "benchmark": printable(settings["benchmark"]),
        "metrics": {name: _jsonable(interval) for name, interval in metrics.items()},
        "left_out": left_out,
        "protocol": {
            "samples": len(drawn.samples),
            "documents_looked_at": drawn.documents,
            "too_short": drawn.too_short,
            "cut": list(CUT),
            **{name: settings[name] for name in ("seed", "max_words", "batch_size", "sampling", "exact")},
            "intervals": {"coverage": COVERAGE, "over": "documents", "resamplings": RESAMPLINGS},
            **protocol,
        },
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _jsonable(interval: Interval) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in interval._asdict().items()
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def shown_texts(drawn: Drawn, records: Sequence[Record], count: int) -> str:
    """The first texts with their true continuations, to be read."""
    lines = []
    for sample, record in list(zip(drawn.samples, records))[:count]:
        lines += [
            f"prompt:    ...{_short(sample.prompt, 200, end=True)}",
            f"written:   {_short(record.continuation, 300)}",
            f"reference: {_short(sample.reference, 300)}",
            "",
        ]
    return printable("\n".join(lines))


def _short(text: str, most: int, end: bool = False) -> str:
    flat = " ".join(text.split())
    return flat[-most:] if end else flat[:most]
