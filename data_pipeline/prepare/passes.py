"""The two passes of a preparation: what is not finished yet is encoded (encode.py), packed and written (assemble.py).

Both run in worker processes, keep what they finished, and depend on nothing but the text, the tokenizer and the options: a killed
run continues and ends with the same bytes, and any number of workers or machines gives the same shards.
"""

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import write_text
from data_pipeline.format.manifest import MANIFEST_NAME, Manifest, Pairs, ShardInfo
from data_pipeline.prepare.assemble import AssembleTask, Group, assemble_group, count_rows, load_group, plan_groups
from data_pipeline.prepare.encode import BundleResult, EncodeTask, encode_bundle, load_result, use_tokenizer
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.resume import (
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
from data_pipeline.text.sources import Source, check_records, files_hash, first_documents, open_source
from data_pipeline.text.tokenization import LoadedTokenizer, load_tokenizer

_COUNTS = ("documents", "without_text", "empty", "too_short", "text_bytes")
_PAIR_COUNTS = ("without_context", "contexts_cut", "targets_cut")


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
    arguments = options.arguments(tokenizer)
    if (output / MANIFEST_NAME).exists():
        return _finished(options, arguments)
    use_tokenizer(tokenizer)
    if part is None:
        import webdataset.writer  # noqa: F401  once, before the workers are forked: it takes 1.5 s, for it imports torch
    with Workers(options.workers) as workers:
        source = _source(options)
        work = open_work(output, source, tokenizer, arguments, alone=part is None and not merge)
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


def _source(options: PrepareOptions) -> Source:
    field, output = options.document_field, str(options.output)
    source = open_source(options.source, field, options.split, output, options.follow_links)
    if options.context_field is not None:
        check_records(source)
    return source if options.max_documents is None else first_documents(source, options.max_documents)


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
            bundle=source.bundles[index],
            text_field=options.document_field,
            work=work,
            eos_id=tokenizer.info.eos_id,
            token_dtype=_token_dtype(tokenizer),
            min_window=options.min_document_length,
            seed=options.seed,
            max_window=options.max_document_length,
            context_field=options.context_field,
            max_documents=source.last if index + 1 == len(source.bundles) else None,
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
            f"{found['too_short']} too short); give more text, or another "
            f"--{'text' if options.target_field is None else 'target'}-field"
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
            has_contexts=options.context_field is not None,
        )

    groups = plan_groups(
        [work / "bundles" / name for name in names],
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
    pairs = None
    if options.context_field is not None and options.target_field is not None:
        pairs = Pairs(context_field=options.context_field, target_field=options.target_field)
    names = _COUNTS + _PAIR_COUNTS * (pairs is not None)
    statistics = source.statistics | {name: sum(getattr(bundle, name) for bundle in bundles) for name in names}
    if options.max_documents is not None:
        statistics["max_documents"] = options.max_documents
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
        text_field=options.text_field if pairs is None else None,
        pairs=pairs,
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


def _finished(options: PrepareOptions, arguments: dict[str, Any]) -> Manifest:
    """The manifest of a folder that is complete, checked against the arguments and the source that it records."""
    manifest = Manifest.load(options.output)
    earlier = finished_arguments(manifest)
    if arguments["--shards"] == "auto":
        del earlier["--shards"]
    check_same(earlier, {name: value for name, value in arguments.items() if name in earlier}, options.output)
    if SOURCE_FILES in earlier:
        source = _source(options)
        check_same(earlier, {SOURCE_FILES: files_hash(options.source, source.units())}, options.output)
    shutil.rmtree(options.output / WORK_FOLDER, ignore_errors=True)
    print(f"{options.output}: already prepared")
    return manifest
