"""Run the frozen teacher over every shard once and store its features, a few bytes a token.

    textldm cache --data data/owt2 --teacher Qwen/Qwen3-1.7B
    deepspeed --hostfile hosts data_pipeline/cache_features.py --config vae_base.json
    textldm cache check --data data/owt2 --features data/owt2/features-Qwen3-1.7B

Works under deepspeed, torchrun, srun and alone. The ranks share nothing but the output folder: rank 0 fits the codec,
rank r writes the shards r, r + W, ...; each shard and its record under `parts/` appear atomically, so that a killed
run continues with the shards that are missing, on any number of ranks. Whoever finds all of them finished writes the
manifest.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.core.configuration import read_config
from data_pipeline.core.devices import device_of, share_cores
from data_pipeline.core.environment import launch
from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.mistakes import check_config
from data_pipeline.core.settings import Section
from data_pipeline.core.storage import is_url, local_folder
from data_pipeline.features.cache import CODEC_NAME
from data_pipeline.features.check import check_cache
from data_pipeline.features.codec_choice import Target
from data_pipeline.features.job import CodecOptions, FeatureJob
from data_pipeline.features.settings import Repa
from data_pipeline.reading.settings import Data


def make_parser() -> argparse.ArgumentParser:
    """Command line of `cache` (the default) and `check`."""
    parser = argparse.ArgumentParser(
        prog="data_pipeline/cache_features.py" if __name__ == "__main__" else "textldm cache",
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


def job_from(args: argparse.Namespace, device: torch.device) -> FeatureJob:
    """Load everything that the command line names."""
    orders: Sequence[int] = range(4) if args.ngram_order is None else range(args.ngram_order + 1)
    return FeatureJob.open(
        data=args.data,
        output=local_folder(cache_folder(args)),
        teacher=args.teacher,
        revision=args.revision,
        layer=-3 if args.layer is None else args.layer,
        dtype=args.dtype or ("bfloat16" if device.type == "cuda" else "float32"),
        device=device,
        token_budget=args.token_budget,
        options=CodecOptions(
            Target(args.target_cosine, args.target_variance),
            tuple(orders),
            args.components,
            args.bits,
            args.exact,
            args.sample_tokens,
        ),
    )


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Entry point."""
    args = with_config(make_parser().parse_args(argv))
    for name in ("data",) if args.command == "check" else ("data", "teacher"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} is missing, and no --config names it")
    ranks = launch(os.environ)
    share_cores(ranks.local_world_size)
    device = device_of(args.device, ranks.local_rank)
    if args.command == "check":
        features = cache_folder(args)
        print(check_cache(args.data, features, args.teacher, device, args.rows, args.token_budget, args.seed))
        return 0
    job = job_from(args, device)
    codec = job.codec_for(ranks.rank, ranks.world_size, args.timeout, args.report_only)
    if codec is not None and not args.report_only:
        job.run(codec, ranks.rank, ranks.world_size)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
