"""Judge a model on a text. How it is called, and what comes out: command_line.py."""

import argparse
import json
import os
import shutil
import sys

import transformers

from data_pipeline.core.devices import device_of, share_cores
from data_pipeline.core.environment import launch
from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import write_text
from pretrain.evaluate import harness, sweep, tables
from pretrain.evaluate.command_line import judges_of, make_parser, read, samples_folder, table_parser
from pretrain.evaluate.evaluate import figures, result, shown_texts, work_of
from pretrain.evaluate.metrics import Judged
from pretrain.evaluate.records import finish
from pretrain.evaluate.samples import draw_samples
from pretrain.evaluate.subjects import Sampling, open_subject

__all__ = ["main", "make_parser"]
SHOWN = 3


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Of the command line."""
    names = ("num_steps", "guidance_scale", "solver", "grid", "token_temperature", "temperature", "top_p")
    interval = tuple(args.guidance_interval) if args.guidance_interval else None
    return Sampling(guidance_interval=interval, **{name: getattr(args, name) for name in names})


def evaluate(args: argparse.Namespace) -> None:
    """One model on one text. Raises: UserError."""
    ranks = launch(os.environ)
    share_cores(ranks.local_world_size)
    device = device_of(args.device, ranks.local_rank)
    sampling = sampling_of(args)
    drawn = draw_samples(args.benchmark, args.samples, args.seed, args.max_words, args.text_field, args.split)
    folder = samples_folder(args.output)
    if args.fresh and ranks.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    subject = open_subject(args.model, sampling, device, args.data, args.data_rows, args.ngram_order)
    work, settings = work_of(args, drawn, subject)
    records = finish(work, folder, settings, ranks.rank, ranks.world_size)
    if records is None:
        print(
            f"rank {ranks.rank}: this rank's texts are written; the figures come from the rank that ends last",
            flush=True,
        )
        return
    metrics, left_out, protocol = figures(
        Judged(drawn.samples, records), judges_of(args), args.data, args.data_rows, args.seed, device
    )
    everything = result(settings, drawn, metrics, left_out, protocol)
    write_text(args.output, json.dumps(everything, indent=1, ensure_ascii=False) + "\n")
    write_text(args.output.with_suffix(".md"), tables.one(everything, "github") + "\n")
    print(shown_texts(drawn, records, SHOWN))
    print(tables.one(everything, "simple"))
    if tables.published(everything):
        print("\n" + tables.several([everything], "simple"))
    print(f"\n{args.output}, {args.output.with_suffix('.md')}; texts in {folder}")


def table(argv: list[str]) -> None:
    """Figures of several evaluations side by side. Raises: UserError."""
    args = table_parser().parse_args(argv)
    print(tables.several([tables.read_result(path) for path in args.results], "github" if args.markdown else "simple"))


@cli
def main(argv: list[str] | None = None) -> int | None:
    """Run the command line."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] == "table":
        table(argv[1:])
        return 0
    if argv and argv[0] == "harness":
        return harness.main(argv[1:])
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if argv and argv[0] == "sweep":
        return sweep.main(argv[1:])
    try:
        evaluate(read(argv))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(str(error)) from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
