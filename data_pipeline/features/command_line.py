"""The command line of `textldm cache`, without torch: a mistake in it is said before imports that take seconds."""

import argparse
import sys
from pathlib import Path

from data_pipeline.core.configuration import read_config
from data_pipeline.core.errors import UserError, check_early
from data_pipeline.core.hub import check_hub_id
from data_pipeline.core.launcher import check_hostfile
from data_pipeline.core.mistakes import check_config
from data_pipeline.core.settings import Section
from data_pipeline.core.storage import is_url, local_folder
from data_pipeline.features.settings import CODEC_NAME, Repa
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.settings import Data


def make_parser() -> argparse.ArgumentParser:
    """Command line of `cache` (the default) and `check`."""
    parser = argparse.ArgumentParser(
        prog="data_pipeline/cache_features.py" if Path(sys.argv[0]).name == "cache_features.py" else "textldm cache",
        description="Cache a frozen teacher's features beside token shards.",
    )
    parser.add_argument("command", nargs="?", choices=("cache", "check"), default="cache")
    parser.add_argument(
        "--config", help="a stage-1 config, path or name: data.path and the section repa fill in what is not given"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of that config, e.g. repa.layer=-2",
    )
    parser.add_argument("--data", help="prepared folder")
    parser.add_argument("--teacher", help="hub id or folder of a causal language model")
    parser.add_argument("--revision", help="commit of the teacher on the hub")
    parser.add_argument("--layer", type=int, help="index into transformers' hidden_states (default -3)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--output", "--features", dest="output", help="cache folder (default <data>/features-<teacher>)"
    )
    codec = parser.add_argument_group("codec", "default: the smallest one that keeps --target-cosine")
    codec.add_argument("--target-cosine", type=float, default=0.99, help="mean cosine to keep on held-back text")
    codec.add_argument(
        "--target-variance", type=float, default=0.9, help="share of the variance about the mean to keep"
    )
    codec.add_argument(
        "--ngram-order", type=int, choices=(0, 1, 2, 3), help="tables of feature means: tried up to this n"
    )
    codec.add_argument("--rank", type=int, dest="components", help="principal components to keep, with --bits")
    codec.add_argument("--bits", type=int, choices=(4, 8, 16), help="bits of every component, with --rank or for all")
    codec.add_argument("--exact", action="store_true", help="the hidden states as they are")
    codec.add_argument("--sample-tokens", type=int, default=200_000, help="tokens to fit the codec on")
    parser.add_argument(
        "--token-budget", type=int, default=16384, help="padded tokens in one pass of the teacher: memory"
    )
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that other ranks wait for the codec")
    parser.add_argument("--report-only", action="store_true", help="print fidelity, size and time, and stop")
    parser.add_argument("--rows", type=int, default=32, help="check: number of random rows")
    parser.add_argument("--seed", type=int, default=0, help="check: which rows")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser


class CacheConfig(Section):
    """The sections of a stage-1 configuration that say what is cached."""

    data: Data
    repa: Repa = Repa()


def with_config(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in from the configuration what the command line leaves open. Raises: UserError."""
    if args.config is None:
        if args.set:
            raise UserError("--set overrides a key of a configuration: name it with --config")
        return args
    raw = read_config(args.config, args.set)
    config = check_config(CacheConfig, raw.values, raw.source, sections_of_others=True)
    found = {
        "data": config.data.path,
        "output": config.repa.features,
        "teacher": config.repa.teacher or config.repa.online_teacher,
        "revision": config.repa.revision,
        "layer": config.repa.layer,
    }
    given = vars(args)
    return argparse.Namespace(**given | {k: v for k, v in found.items() if given[k] is None and v is not None})


def cache_folder(args: argparse.Namespace) -> str:
    """The cache's folder: as given, else beside the data by the teacher's name, else the only one there. Raises: UserError."""
    if args.output is not None:
        return args.output
    if args.teacher is not None:
        return f"{args.data}/features-{Path(args.teacher).name}"
    found = [] if is_url(args.data) else sorted(path.parent for path in Path(args.data).glob(f"*/{CODEC_NAME}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{args.data} holds the feature caches: {names}; name one with --features, or its --teacher")
    return str(found[0])


def read(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with what the configuration fills in. Raises: UserError, also for what they name and is not there."""
    args = with_config(make_parser().parse_args(argv))
    for name in ("data",) if args.command == "check" else ("data", "teacher"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing, and no --config names it")
    if args.command == "cache":
        local_folder(cache_folder(args))
    Manifest.load(args.data)
    if args.teacher is not None and not Path(args.teacher).is_dir():
        check_hub_id(args.teacher, "no teacher at", "a hub id or a local Hugging Face folder")
    if args.command == "check":
        cache_folder(args)
    return args


def check(argv: list[str] | None = None) -> None:
    """End the process with a line and exit code 2 if `read` finds a mistake, or deepspeed did not find its hostfile."""

    def read_all(argv: list[str] | None) -> None:
        read(argv)
        check_hostfile()

    check_early(read_all, argv)
