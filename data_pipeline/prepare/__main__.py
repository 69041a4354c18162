"""Prepare a text source for training: tokenise, pack, shuffle, write shards and their manifest. See `--help`.

Pass 1 (encode.py) turns bundles of the source's units into spill chunks below `<output>/.prepare`, pass 2 (assemble.py) turns
ranges of document hashes into shards.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import local_folder
from data_pipeline.format.manifest import Manifest
from data_pipeline.prepare.inspect import inspect
from data_pipeline.prepare.options import TEXT_FIELD, PrepareOptions
from data_pipeline.prepare.passes import prepare
from data_pipeline.prepare.verify import verify
from data_pipeline.prepare.workers import disk_errors


def _part(text: str) -> tuple[int, int]:
    try:
        index, count = (int(number) for number in text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with 0 <= i < n, for example 0/4")
    return index, count


def _shards(text: str) -> int | None:
    return None if text == "auto" else int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line, without that of inspect and verify."""
    parser = argparse.ArgumentParser(
        prog="textldm prepare",
        description="Tokenise, pack and shuffle text into WebDataset shards. Run it again to continue after a kill.",
        epilog="`prepare inspect FOLDER` describes a prepared folder, `prepare verify FOLDER` checks all of it.",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--source", required=True, help="a file of text, a folder of them, a Hugging Face dataset, or 'installed'"
    )
    parser.add_argument("--tokenizer", required=True, help="folder, tokenizer.json or Hugging Face name")
    parser.add_argument("--tokenizer-revision", help="commit or tag of the tokenizer on the hub")
    parser.add_argument("--output", required=True, help="folder for shards and manifest")
    parser.add_argument("--text-field", default=TEXT_FIELD, help="field of a record that holds the text (%(default)s)")
    parser.add_argument(
        "--context-field", help="field of a record that holds the context (prompt) of its --target-field; may be empty"
    )
    parser.add_argument(
        "--target-field",
        help="field of a record that holds its target (response): windows are pairs, for data.split.kind=data",
    )
    parser.add_argument(
        "--split",
        help="of a folder whose names tell splits apart, or of a dataset: this one (train), or all files of a folder: all",
    )
    parser.add_argument(
        "--max-documents", type=int, metavar="N", help="the first N documents of the source, to try things (all)"
    )
    parser.add_argument(
        "--follow-links", action="store_true", help="of a folder, also read what links in it lead to elsewhere"
    )
    parser.add_argument(
        "--row-tokens", type=int, default=PrepareOptions.row_tokens, help="tokens of a row (%(default)s)"
    )
    parser.add_argument(
        "--max-document-length", type=int, default=1024, help="tokens of the longest window (%(default)s)"
    )
    parser.add_argument(
        "--min-document-length", type=int, default=8, help="shorter documents are dropped (%(default)s tokens)"
    )
    parser.add_argument(
        "--shards",
        type=_shards,
        default=None,
        metavar="N|auto",
        help="train shards (auto: multiples of 48, about 4M tokens each)",
    )
    parser.add_argument(
        "--heldout-fraction", type=float, default=0.005, help="share of documents held out, by hash (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the assignment and the permutations (%(default)s)")
    parser.add_argument("--dedupe", action="store_true", help="keep one of documents with exactly the same text")
    parser.add_argument("--workers", type=int, default=cores, help="worker processes (%(default)s)")
    parser.add_argument(
        "--part",
        type=_part,
        metavar="i/n",
        help="encode only this share of the source, for several machines on one --output",
    )
    parser.add_argument("--merge", action="store_true", help="build the shards once all parts are encoded")
    parser.add_argument("--fresh", action="store_true", help="discard what an earlier run wrote to --output")
    return parser


def _summary(output: Path, manifest: Manifest) -> Iterator[str]:
    """Lines for the user: counts of documents, rows, shards and fill."""
    counts = manifest.statistics
    if "train_documents" in counts:
        yield (
            f"{counts['documents']} documents: {counts['train_documents']} train, {counts['heldout_documents']} held out, "
            f"{counts['without_text']} without text, {counts['empty']} empty, {counts['too_short']} shorter than "
            f"{manifest.min_window} tokens, {counts['duplicates']} duplicates"
        )
    if manifest.pairs and "contexts_cut" in counts:
        yield (
            f"pairs: {counts['without_context']} without context; cut to windows of {manifest.max_window} tokens: "
            f"{counts['contexts_cut']} contexts at their beginning, {counts['targets_cut']} targets at their end"
        )
    if manifest.tokenizer.eos_id is None:
        yield "without document ends: the tokenizer has no end-of-text token"
    rows = sum(shard.rows for shard in manifest.splits["train"])
    yield f"{output}: {rows} train rows in {len(manifest.splits['train'])} shards, fill {100 * manifest.fill():.2f} %"


@cli
def main(argv: list[str] | None = None) -> None:
    """Prepare, inspect or verify."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["inspect"], ["verify"]):
        parser = argparse.ArgumentParser(prog=f"textldm prepare {argv[0]}")
        parser.add_argument("folder")
        folder = local_folder(parser.parse_args(argv[1:]).folder)
        for line in inspect(folder) if argv[0] == "inspect" else verify(folder):
            print(line)
        return
    arguments = vars(make_parser().parse_args(argv))
    part, merge, fresh = (arguments.pop(name) for name in ("part", "merge", "fresh"))
    if part is not None and merge:
        raise UserError("--part encodes and --merge finishes: give one of them")
    options = PrepareOptions(**arguments | {"output": local_folder(arguments["output"])})
    with disk_errors(options.output):
        manifest = prepare(options, part, merge, fresh)
    if manifest is not None:
        for line in _summary(options.output, manifest):
            print(line)


if __name__ == "__main__":
    raise SystemExit(main())
