"""Prepare a text source for training: tokenise, pack, shuffle, write shards and their manifest. See `--help`.

Pass 1 (encode.py) turns bundles of the source's units into spill chunks below `<output>/.prepare`, pass 2 (assemble.py) turns
ranges of document hashes into shards. Both passes run in worker processes, keep what they finished, and depend on
nothing but the text, the tokenizer and the arguments: a killed run continues and ends with the same bytes, and any
number of workers or machines gives the same shards.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import local_folder, write_text
from data_pipeline.format.manifest import MANIFEST_NAME, MAX_SHARDS, Manifest, ShardInfo
from data_pipeline.prepare.assemble import AssembleTask, Group, assemble_group, count_rows, load_group, plan_groups
from data_pipeline.prepare.encode import BundleResult, EncodeTask, encode_bundle, load_result, use_tokenizer
from data_pipeline.prepare.inspect import inspect, verify
from data_pipeline.prepare.ledger import (
    SOURCE_FILES,
    WORK_FOLDER,
    check_complete,
    check_same,
    finished_arguments,
    open_work,
    remove_earlier,
    remove_leftovers,
)
from data_pipeline.prepare.workers import Progress, Workers, disk_errors
from data_pipeline.text.sources import Source, files_hash, open_source, source_name
from data_pipeline.text.tokenization import LoadedTokenizer, load_tokenizer

_COUNTS = ("documents", "without_text", "empty", "too_short", "text_bytes")


@dataclass(frozen=True)
class PrepareOptions:
    """Arguments of a preparation; see the command's help for each."""

    source: str
    tokenizer: str
    output: Path
    text_field: str = "text"
    split: str | None = None
    tokenizer_revision: str | None = None
    row_tokens: int = 4096
    max_document_length: int = 1024
    min_document_length: int = 8
    shards: int | None = None
    heldout_fraction: float = 0.005
    seed: int = 0
    dedupe: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("row_tokens", "max_document_length", "min_document_length", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least 1")
        if self.max_document_length < 2 * self.min_document_length:
            raise UserError(
                f"--max-document-length {self.max_document_length} is less than twice --min-document-length "
                f"{self.min_document_length}: "
                "a document slightly too long for one window could not be cut into two; raise the one or lower the "
                "other"
            )
        if self.row_tokens < self.max_document_length:
            raise UserError(
                f"--row-tokens {self.row_tokens} is less than --max-document-length {self.max_document_length}: "
                "a window must fit a row; raise the one or lower the other"
            )
        if self.shards is not None and not 1 <= self.shards <= MAX_SHARDS:
            raise UserError(f"--shards {self.shards}: expected 1 to {MAX_SHARDS}, or auto")
        if not 0 <= self.heldout_fraction < 1:
            raise UserError(f"--heldout-fraction {self.heldout_fraction}: expected a share in [0, 1)")


def prepare(
    options: PrepareOptions, part: tuple[int, int] | None = None, merge: bool = False, fresh: bool = False
) -> Manifest | None:
    """Prepare a source, or continue where an earlier call with the same options stopped.

    Args:
        part: (i, n) encodes only the i-th of n shares of the source, i from 0; returns None.
        merge: build the shards from parts encoded elsewhere; refuses if any is missing.
        fresh: remove an earlier result first.

    Returns:
        The manifest of the finished folder.
    """
    output = options.output
    if fresh:
        remove_earlier(output)
    tokenizer = load_tokenizer(options.tokenizer, options.tokenizer_revision)
    if tokenizer.info.eos_id is None:
        print(
            f"warning: tokenizer {options.tokenizer} has no end-of-text token: nothing will tell where documents end, and a model "
            "trained on them will not learn to stop; if it has one, name it as eos_token in its tokenizer_config.json",
            file=sys.stderr,
        )
    arguments = _arguments(options, tokenizer)
    if (output / MANIFEST_NAME).exists():
        return _finished(options, arguments)
    use_tokenizer(tokenizer)
    if part is None:
        import webdataset.writer  # noqa: F401  once, before the workers are forked: it takes 1.5 s, for it imports torch
    with Workers(options.workers) as workers:
        source = open_source(options.source, options.text_field, options.split, str(output))
        work = open_work(output, source, tokenizer, arguments)
        indices = range(len(source.bundles)) if part is None else range(part[0], len(source.bundles), part[1])
        if merge:
            check_complete(work, len(source.bundles))
        else:
            _encode(options, source, tokenizer, work, indices, workers)
        if part is None:
            return _assemble(options, source, tokenizer, work, workers)
    print(
        f"{output}: part {part[0]}/{part[1]} encoded; when all are, run the same command with --merge instead of --part"
    )
    return None


def _encode(
    options: PrepareOptions,
    source: Source,
    tokenizer: LoadedTokenizer,
    work: Path,
    indices: Iterable[int],
    workers: Workers,
) -> None:
    """Pass 1 over the bundles that are not finished yet."""
    tasks = [
        EncodeTask(
            index=index,
            units=source.bundles[index],
            text_field=options.text_field,
            work=work,
            eos_id=tokenizer.info.eos_id,
            token_dtype=_token_dtype(tokenizer),
            min_window=options.min_document_length,
            seed=options.seed,
        )
        for index in indices
        if load_result(work, index) is None
    ]
    with Progress("encoding", len(tasks), "documents") as progress:
        workers.run(_guarded_encode, tasks, progress)


def _assemble(
    options: PrepareOptions, source: Source, tokenizer: LoadedTokenizer, work: Path, workers: Workers
) -> Manifest:
    """Pass 2 and the manifest."""
    bundles = [load_result(work, index) or BundleResult() for index in range(len(source.bundles))]
    names = [name for bundle in bundles for name in bundle.chunks]
    if not names:
        found = {name: sum(getattr(bundle, name) for bundle in bundles) for name in _COUNTS}
        raise UserError(
            f"source {options.source}: no document of at least --min-document-length {options.min_document_length} tokens "
            f"({found['documents']} documents found, {found['without_text']} of them without text, {found['empty']} empty, "
            f"{found['too_short']} too short); give more text, or another --text-field"
        )

    def task_for(group: Group) -> AssembleTask:
        return AssembleTask(
            group=group,
            output=options.output,
            work=work,
            chunks=names,
            row_tokens=options.row_tokens,
            min_window=options.min_document_length,
            max_window=options.max_document_length,
            token_dtype=_token_dtype(tokenizer),
            seed=options.seed,
            dedupe=options.dedupe,
        )

    groups = plan_groups(
        [work / "units" / name for name in names],
        options.row_tokens,
        options.heldout_fraction,
        options.shards,
        lambda group: count_rows(task_for(group)),
    )
    tasks = [task_for(group) for group in groups]
    with Progress("packing", len(tasks), "documents") as progress:
        unfinished = [task for task in tasks if load_group(work, task.group) is None]
        workers.run(_guarded_assemble, unfinished, progress)
    results = [load_group(work, group) for group in groups]
    manifest = _manifest(options, source, tokenizer, bundles, [result for result in results if result])
    tokenizer.save(options.output / "tokenizer")
    remove_leftovers(options.output)
    write_text(options.output / MANIFEST_NAME, manifest.model_dump_json(indent=1))
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _manifest(
    options: PrepareOptions,
    source: Source,
    tokenizer: LoadedTokenizer,
    bundles: list[BundleResult],
    groups: list[dict[str, Any]],
) -> Manifest:
    splits: dict[str, list[ShardInfo]] = {"train": [], "heldout": []}
    for group in groups:
        splits[group["split"]] += [ShardInfo(**shard) for shard in group["shards"]]
    statistics = source.statistics | {name: sum(getattr(bundle, name) for bundle in bundles) for name in _COUNTS}
    statistics["duplicates"] = sum(group["duplicates"] for group in groups)
    for split in splits:
        statistics[f"{split}_documents"] = sum(group["documents"] for group in groups if group["split"] == split)
    return Manifest.create(
        row_tokens=options.row_tokens,
        token_dtype=_token_dtype(tokenizer),
        min_window=options.min_document_length,
        max_window=options.max_document_length,
        seed=options.seed,
        heldout_fraction=float(options.heldout_fraction),
        dedupe=options.dedupe,
        tokenizer=tokenizer.info,
        splits=splits,
        source=source.name,
        text_field=options.text_field,
        source_files=files_hash(options.source, source.units()),
        statistics=statistics,
    )


def _guarded_encode(task: EncodeTask, progress: Callable[[int, int], None]) -> None:
    with disk_errors(task.work):
        encode_bundle(task, progress)


def _guarded_assemble(task: AssembleTask, progress: Callable[[int, int], None]) -> None:
    with disk_errors(task.output):
        progress(assemble_group(task)["documents"], 0)


def _token_dtype(tokenizer: LoadedTokenizer) -> str:
    return "uint16" if tokenizer.info.vocab_size <= 1 << 16 else "uint32"


def _arguments(options: PrepareOptions, tokenizer: LoadedTokenizer) -> dict[str, Any]:
    """What must not change between two runs on the same output, by the names of the command line."""
    return {
        "--source": source_name(options.source, options.split),
        "--text-field": options.text_field,
        "--tokenizer (hash)": tokenizer.info.sha256,
        "--row-tokens": options.row_tokens,
        "--max-document-length": options.max_document_length,
        "--min-document-length": options.min_document_length,
        "--heldout-fraction": float(options.heldout_fraction),
        "--seed": options.seed,
        "--dedupe": options.dedupe,
        "--shards": options.shards or "auto",
    }


def _finished(options: PrepareOptions, arguments: dict[str, Any]) -> Manifest:
    """The manifest of a folder that is complete, checked against the arguments and the source that it records."""
    manifest = Manifest.load(options.output)
    earlier = finished_arguments(manifest)
    if arguments["--shards"] == "auto":
        del earlier["--shards"]
    check_same(earlier, {name: value for name, value in arguments.items() if name in earlier}, options.output)
    if SOURCE_FILES in earlier:
        source = open_source(options.source, options.text_field, options.split, str(options.output))
        check_same(earlier, {SOURCE_FILES: files_hash(options.source, source.units())}, options.output)
    shutil.rmtree(options.output / WORK_FOLDER, ignore_errors=True)
    print(f"{options.output}: already prepared")
    return manifest


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
    parser.add_argument("--text-field", default="text", help="field of a record that holds the text (%(default)s)")
    parser.add_argument(
        "--split",
        help="of a folder whose names tell splits apart, or of a dataset: this one (train), or all files of a folder: all",
    )
    parser.add_argument("--row-tokens", type=int, default=4096, help="tokens of a row (%(default)s)")
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
    """What became of the documents, and the shards."""
    counts = manifest.statistics
    if "train_documents" in counts:
        yield (
            f"{counts['documents']} documents: {counts['train_documents']} train, {counts['heldout_documents']} held out, "
            f"{counts['without_text']} without text, {counts['empty']} empty, {counts['too_short']} shorter than "
            f"{manifest.min_window} tokens, {counts['duplicates']} duplicates"
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
