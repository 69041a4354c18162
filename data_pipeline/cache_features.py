"""Run the frozen teacher over every shard once and store its features, a few bytes a token.

    textldm cache --data data/owt2 --teacher Qwen/Qwen3-1.7B
    deepspeed --hostfile hosts data_pipeline/cache_features.py --config vae_base.json
    textldm cache check --data data/owt2 --teacher Qwen/Qwen3-1.7B

Works under deepspeed, torchrun, srun and alone. The ranks share nothing but the output folder: rank 0 fits the codec,
rank r writes the shards r, r + W, ...; each shard and its record under `parts/` appear atomically, so that a killed
run continues with the shards that are missing, on any number of ranks. Whoever finds all of them finished writes the
manifest.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

if __name__ == "__main__":
    # While the imports take their time there is nothing to end in order: Ctrl-C ends the process without a traceback.
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from data_pipeline.core.imports import begin_imports, end_imports
    from data_pipeline.features.command_line import check

    begin_imports()
    check()  # a mistake is said before torch is imported, which takes seconds

import torch

from data_pipeline.core.devices import device_of, share_cores
from data_pipeline.core.environment import launch
from data_pipeline.core.errors import cli
from data_pipeline.core.storage import local_folder
from data_pipeline.features.check import check_cache
from data_pipeline.features.codec_choice import Target
from data_pipeline.features.command_line import cache_folder, make_parser, read
from data_pipeline.features.job import CodecOptions, FeatureJob

__all__ = ["main", "make_parser"]


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
    args = read(argv)
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
    end_imports()
    signal.signal(signal.SIGINT, interrupted)
    sys.exit(main(sys.argv[1:]))
