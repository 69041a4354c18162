"""The command line of `textldm evaluate`, without torch: a mistake in it is said before imports that take seconds."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError, check_early
from data_pipeline.core.hub import check_hub_id
from pretrain.evaluate import paper
from pretrain.evaluate.samples import BENCHMARKS

DESCRIPTION = """Judge a model by what it writes and by the probability that it gives to text.

    textldm evaluate --model export/textldm-xl --benchmark wikipedia --output results/xl-wikipedia.json
    textldm evaluate --model gpt2 --benchmark wikipedia --output results/gpt2-wikipedia.json
    textldm evaluate table results/*.json                  figures of several models side by side
    textldm evaluate sweep --model export/textldm-xl --benchmark wikipedia --output results/sweep.json
    textldm evaluate harness --model textldm --model_args pretrained=export/textldm-xl --tasks lambada_openai

Documents are cut into a prompt and its true continuation; the model continues the prompt by as many tokens. Every figure comes with the
ends of its 95 % interval over documents. Beside OUTPUT.json, which holds everything that would change them, OUTPUT.samples/ keeps the
texts: a killed evaluation goes on there, several ranks (torchrun, srun) share it, and the same command with another judge takes the
texts as they are.
"""
SWEEP = """Which sampling serves a model best: its settings against quality and cost, on one text.

    textldm evaluate sweep --model export/x --benchmark my.jsonl --judge gpt2 --output sweep.json --guidance-scales 1 2 4

Every combination writes the same documents from the same noise. Cost: network evaluations a text, two for each step with guidance.
Quality: `--by`, one of the figures. The Pareto set are the settings that no other beats at the same or a lower cost.
"""
EVALUATIONS = {"euler": 1, "heun": 2, "multistep": 1}
"""Of the velocity in each step; other solvers count as one."""
DEFAULT_FEATURIZER = "gpt2-large"
DEFAULT_BERT = "roberta-large"


@dataclass(frozen=True)
class Judges:
    """Models that some figures need."""

    mauve: str
    mauve_buckets: int | None
    bert: str
    bert_layer: int | None
    judge: str


def make_parser() -> argparse.ArgumentParser:
    """The command line, without those of table, sweep and harness."""
    parser = argparse.ArgumentParser(
        prog="textldm evaluate", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task(parser)
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the figures; texts go beside it")
    parser.add_argument("--fresh", action="store_true", help="drop the texts that an earlier evaluation left there")
    group = parser.add_argument_group("sampling; default: the model's own")
    group.add_argument(
        "--num-steps", type=int, help="solver steps of a TextLDM, unmasking steps of masked diffusion (64)"
    )
    group.add_argument("--guidance-scale", type=float, help="1 is none")
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="times with guidance",
    )
    group.add_argument("--solver", help="euler, heun or multistep")
    group.add_argument("--grid", help="of the solver's times")
    group.add_argument("--token-temperature", type=float, help="with the categorical head, below 1 sharper")
    group.add_argument("--temperature", type=float, default=1.0, help="of causal language models (%(default)s)")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="of causal language models (%(default)s: the model's own distribution)"
    )
    return parser


def add_task(parser: argparse.ArgumentParser) -> None:
    """Arguments that name the model, the text, and the judges."""
    parser.add_argument(
        "--model",
        required=True,
        help="exported TextLDM or causal language model (folder, hub id), a run of stage ar or mdlm, or one of: reference (the true"
        " continuations), chance (another document's), ngram (Kneser-Ney on the shards of --data)",
    )
    parser.add_argument(
        "--benchmark",
        required=True,
        help=f"{', '.join(BENCHMARKS)}, or a text: a .jsonl file, or whatever textldm prepare --source takes",
    )
    parser.add_argument("--text-field", help="field of a record that holds the text (text)")
    parser.add_argument("--split", help="of a dataset or folder")
    parser.add_argument("--samples", type=int, default=1000, help="documents (%(default)s)")
    parser.add_argument(
        "--max-words", type=int, default=paper.WORDS, help="of a document, its first ones (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of documents, cuts and noise (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="documents drawn together (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument(
        "--data",
        help="prepared data that the model was trained on: what of its words, and of its text, is copied; for --model ngram",
    )
    parser.add_argument("--data-rows", type=int, default=20_000, help="rows of it that are read (%(default)s)")
    parser.add_argument("--ngram-order", type=int, default=4, help="tokens of the longest n-gram (%(default)s)")
    group = parser.add_argument_group(
        "judges: hub ids or folders; a figure is left out, and said, where its model cannot be had"
    )
    group.add_argument("--mauve-model", default=DEFAULT_FEATURIZER, help="whose features MAUVE compares (%(default)s)")
    group.add_argument("--mauve-buckets", type=int, help="of its histograms (a tenth of the documents)")
    group.add_argument("--bertscore-model", default=DEFAULT_BERT, help="(%(default)s)")
    group.add_argument("--bertscore-layer", type=int, help="(the package's choice, else the last)")
    group.add_argument("--judge", default=DEFAULT_FEATURIZER, help="language model of generative_nll (%(default)s)")


def check_task(args: argparse.Namespace) -> None:
    """What add_task's arguments must hold. Raises: UserError."""
    for name in ("samples", "max_words", "batch_size", "data_rows", "ngram_order"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected at least 1")
    if args.max_words < 2:
        raise UserError(f"--max-words is {args.max_words}; expected at least 2, a prompt's and a continuation's")
    if args.mauve_buckets is not None and args.mauve_buckets < 2:
        raise UserError(f"--mauve-buckets is {args.mauve_buckets}; expected at least 2")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed is {args.seed}; expected 0 to 2^63 - 1")
    if args.model not in ("reference", "chance", "ngram") and not Path(args.model).is_dir():
        check_hub_id(
            args.model, "--model", "an exported folder, a run of stage ar or mdlm, a hub id, reference, chance or ngram"
        )
    if args.model == "ngram" and args.data is None:
        raise UserError("--model ngram counts the shards of prepared data: name them with --data")


def read(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments. Raises: UserError."""
    args = make_parser().parse_args(argv)
    check_task(args)
    if args.num_steps is not None and args.num_steps < 1:
        raise UserError(f"--num-steps is {args.num_steps}; expected at least 1")
    if not (args.temperature > 0 and 0 < args.top_p <= 1):
        raise UserError(
            f"--temperature is {args.temperature:g} and --top-p {args.top_p:g}; expected above 0, and above 0 up to 1"
        )
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: expected a file that ends in .json")
    return args


def judges_of(args: argparse.Namespace) -> Judges:
    """Of the command line."""
    return Judges(args.mauve_model, args.mauve_buckets, args.bertscore_model, args.bertscore_layer, args.judge)


def samples_folder(output: Path) -> Path:
    """Where the texts of an evaluation lie."""
    return output.with_suffix(".samples")


def table_parser() -> argparse.ArgumentParser:
    """The command line of the table."""
    parser = argparse.ArgumentParser(
        prog="textldm evaluate table", description="Figures of several evaluations side by side."
    )
    parser.add_argument("results", nargs="+", type=Path, help="files of --output")
    parser.add_argument("--markdown", action="store_true", help="as Markdown")
    return parser


def sweep_parser() -> argparse.ArgumentParser:
    """The command line of the sweep."""
    parser = argparse.ArgumentParser(
        prog="textldm evaluate sweep", description=SWEEP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task(parser)
    parser.set_defaults(samples=100)
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a plot and the texts go beside it")
    parser.add_argument(
        "--num-steps", type=int, nargs="+", default=[], help="default of each of these: the model's own"
    )
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[])
    parser.add_argument("--guidance-intervals", nargs="+", default=[], metavar="FROM:TO", help="times with guidance")
    parser.add_argument("--solvers", nargs="+", default=[], choices=list(EVALUATIONS))
    parser.add_argument("--token-temperatures", type=float, nargs="+", default=[])
    parser.add_argument("--by", default="generative_nll", help="the figure that is quality (%(default)s)")
    parser.add_argument(
        "--write-defaults",
        action="store_true",
        help="write the best settings into the exported folder, as its defaults",
    )
    return parser


def combinations(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of the values given. Raises: UserError."""
    axes = {
        "num_steps": args.num_steps,
        "guidance_scale": args.guidance_scales,
        "guidance_interval": [_interval(text) for text in args.guidance_intervals],
        "solver": args.solvers,
        "token_temperature": args.token_temperatures,
    }
    given = {name: values for name, values in axes.items() if values}
    if not given:
        raise UserError(
            "nothing to sweep; expected values of at least one of --num-steps, --guidance-scales, ... (--help)"
        )
    return [dict(zip(given, values)) for values in itertools.product(*given.values())]


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high <= 1:
        raise UserError(f"--guidance-intervals {text}: expected FROM:TO with 0 <= FROM < TO <= 1, for example 0.2:0.8")
    return low, high


def read_sweep(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of a sweep. Raises: UserError."""
    args = sweep_parser().parse_args(argv)
    check_task(args)
    combinations(args)
    if args.output.suffix != ".json":
        raise UserError(f"--output {args.output}: expected a file that ends in .json")
    return args


PARTS = {"table": table_parser, "sweep": sweep_parser}
"""`textldm evaluate NAME`; besides, harness, whose command line is the harness's own."""


def check(argv: list[str] | None = None) -> None:
    """End the process with a line and exit code 2 if there is a mistake."""
    if not argv or argv[0] not in (*PARTS, "harness"):
        check_early(read, argv)
    elif argv[0] == "sweep":
        check_early(read_sweep, argv[1:])
