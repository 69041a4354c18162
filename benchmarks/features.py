"""What the feature cache takes, what it keeps, and what it saves.

    python -m benchmarks.features
    python -m benchmarks.features --data data/x --teacher Qwen/Qwen3-1.7B --device cuda

Two teachers: stories260K on tinystories (../shared; --corpus and --corpus-teacher name others) and that of `./run.sh`: the one in
runs/quickstart where there is one, else it is made anew as there (--data and --teacher name others).

`feature_bytes_ratio`: bytes a token of the smallest codec with a mean cosine of 0.99, over those of bfloat16; the larger one of
the two teachers. `mean_cosine`: the smaller one, of windows in the held-out split, which no fit and no choice has seen.
`table`: rank x bits, and the best mixed codec of each order of n-gram tables, as `cache_features` prints it.
`exact_minus_online`, `repa_loss_relative_difference` and more: see feature_losses.py. `online_over_cached`: see online_teacher.py.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.feature_losses import compare_losses
from benchmarks.measuring import ROOT, SHARED, existing, phase, print_figures
from benchmarks.online_teacher import SCALES, compare_speed
from data_pipeline.core.devices import device_of
from data_pipeline.core.errors import UserError, cli
from data_pipeline.features.codec_choice import Target, choose, measure
from data_pipeline.features.job import CodecOptions, FeatureJob
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.passes import prepare
from pretrain.quickstart.plan import ROW_TOKENS, WINDOW_TOKENS, Plan

QUICKSTART = ROOT / "runs/quickstart"
LAYER = -3


@dataclass(frozen=True)
class Subject:
    """A teacher with text that it knows, prepared with its tokenizer."""

    name: str
    data: Path
    teacher: str


def main_parser() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.features",
        description="Size and fidelity of cached features, their losses, their speed.",
    )
    shared = SHARED / "corpora/tinystories.jsonl", SHARED / "teachers/stories260K"
    parser.add_argument("--corpus", type=Path, default=shared[0], help="text of the first teacher (%(default)s)")
    parser.add_argument(
        "--corpus-teacher", type=Path, default=shared[1], help="folder of the first teacher (%(default)s)"
    )
    parser.add_argument("--data", type=Path, help="prepared folder of the second teacher (runs/quickstart/data)")
    parser.add_argument("--teacher", help="folder or hub name of the second teacher (runs/quickstart/teacher)")
    parser.add_argument("--sample-tokens", type=int, default=200_000, help="to fit the codec on (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=25, help="of the stage-1 runs whose losses are compared (%(default)s)"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of each step that is timed (%(default)s)")
    parser.add_argument(
        "--scale", type=int, choices=SCALES, help="divides Qwen3-1.7B and vae_base for timing (1 on a GPU, else 4)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    return parser


def corpus_subject(corpus: Path, teacher: Path, work: Path) -> Subject:
    """The first teacher, its text prepared as the quickstart's."""
    prepare(
        PrepareOptions(
            source=str(existing(corpus, "--corpus")),
            tokenizer=str(existing(teacher, "--corpus-teacher")),
            output=work / "corpus",
            row_tokens=ROW_TOKENS,
            max_document_length=WINDOW_TOKENS,
            heldout_fraction=0.02,
        )
    )
    return Subject(f"{teacher.name} on {corpus.stem}", work / "corpus", str(teacher))


def quickstart_subject(data: Path | None, teacher: str | None, work: Path) -> Subject:
    """The second teacher: as given, as `./run.sh` left it, or made by the same commands."""
    if (data is None) != (teacher is None):
        raise UserError("--data and --teacher belong together: give both, or neither for the quickstart's")
    if data is not None and teacher is not None:
        return Subject(f"{Path(teacher).name} on {data.name}", existing(data, "--data"), teacher)
    folder = QUICKSTART
    if not ((folder / "data/manifest.json").exists() and (folder / "teacher/config.json").exists()):
        folder = work / "quickstart"
        for step in Plan(folder, "installed", tokenizer=None, teacher=None, long=False).before_dit()[:3]:
            code = subprocess.run([sys.executable, *step.command[1:]], stdout=sys.stderr, check=False).returncode
            if code:
                raise UserError(
                    f"the quickstart's step {step.name} ended with exit code {code}; mend what it says above"
                )
    return Subject("quickstart", folder / "data", str(folder / "teacher"))


def measure_subject(
    subject: Subject, sample_tokens: int, steps: int, device: torch.device, work: Path
) -> dict[str, Any]:
    """Figures of one teacher."""
    job = FeatureJob.open(
        data=str(subject.data),
        output=work / "unused",
        teacher=subject.teacher,
        revision=None,
        layer=LAYER,
        dtype="bfloat16" if device.type == "cuda" else "float32",
        device=device,
        token_budget=16384,
        options=CodecOptions(Target(0.99), sample_tokens=sample_tokens),
    )
    with phase(f"{subject.name}: choosing a codec"):
        codec, fidelity, table = choose(job.sample(), job.options.target, job.options.ngram_orders, job.num_places)
        held = job.sample("heldout")
        held_out = measure(codec, held)
    print(f"\n{subject.name}: {job.num_tokens:,} tokens\n" + "\n".join(job.report(codec, fidelity, table)), flush=True)
    print(
        f"held-out windows: cosine mean {held_out.mean_cosine:.5f}, 1st percentile {held_out.p1_cosine:.5f}", flush=True
    )
    losses = compare_losses(job, codec, fidelity, held, steps, work, subject.name)
    print(json.dumps({subject.name: losses}), flush=True)
    columns = ("rank", "bits", "ngram_order", "bytes_per_token", "bf16_ratio", "mean_cosine", "p1_cosine", "explained")
    return {
        "bf16_ratio": fidelity.bf16_ratio,
        "bytes_per_token": fidelity.bytes_per_token,
        "mean_cosine": held_out.mean_cosine,
        "p1_cosine": held_out.p1_cosine,
        "codec": codec.describe(),
        "tokens": job.num_tokens,
        "cache_over_bf16_files": job.cache_bytes(codec) / (2 * codec.feature_dim * job.num_places),
        "table": [{name: asdict(row)[name] for name in columns} for row in table],
        **losses,
    }


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = main_parser().parse_args(argv)
    device = device_of(args.device)
    with tempfile.TemporaryDirectory(prefix="benchmark-features-") as folder:
        work = Path(folder)
        with phase("texts and teachers"):
            subjects = [
                corpus_subject(args.corpus, args.corpus_teacher, work),
                quickstart_subject(args.data, args.teacher, work),
            ]
        found = {}
        for number, subject in enumerate(subjects):
            found[subject.name] = measure_subject(subject, args.sample_tokens, args.steps, device, work / str(number))
        scale = args.scale or (1 if device.type == "cuda" else 4)
        with phase("steps with the online teacher and with cached features"):
            speed = compare_speed(args.corpus, args.corpus_teacher, scale, args.repetitions, device, work / "speed")
    worst = {
        "feature_bytes_ratio": max(figures["bf16_ratio"] for figures in found.values()),
        "mean_cosine": min(figures["mean_cosine"] for figures in found.values()),
    }
    for name in ("exact_minus_online", "repa_loss_relative_difference", "repa_loss_after_training_relative_difference"):
        worst[name] = max(figures[name] for figures in found.values())
    print_figures(worst | speed | {"teachers": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
