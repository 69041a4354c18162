"""Going on after a kill: the work folder says what was asked for, and other arguments or another source are refused."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import remove_unfinished, write_text
from data_pipeline.format.manifest import MANIFEST_NAME, Manifest
from data_pipeline.prepare.encode import load_result
from data_pipeline.text.sources import Source
from data_pipeline.text.tokenization import LoadedTokenizer

WORK_FOLDER = ".prepare"
SOURCE_FILES = "--source (hash of its files' names and sizes)"


def finished_arguments(manifest: Manifest) -> dict[str, Any]:
    """Arguments of the command line, by name, that a finished folder was prepared with; those that its manifest records."""
    earlier = {
        "--source": manifest.source,
        SOURCE_FILES: manifest.source_files,
        "--text-field": manifest.text_field,
        "--context-field": manifest.pairs.context_field if manifest.pairs else "none",
        "--target-field": manifest.pairs.target_field if manifest.pairs else "none",
        "--tokenizer (hash)": manifest.tokenizer.sha256,
        "--row-tokens": manifest.row_tokens,
        "--max-document-length": manifest.max_window,
        "--min-document-length": manifest.min_window,
        "--heldout-fraction": manifest.heldout_fraction,
        "--seed": manifest.seed,
        "--max-documents": manifest.statistics.get("max_documents") or "all",
        "--dedupe": manifest.dedupe,
        "--shards": len(manifest.splits["train"]),
    }
    return {name: value for name, value in earlier.items() if value is not None}


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], output: Path) -> None:
    """Refuse to continue with other arguments, naming both values."""
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}" for name, value in now.items() if before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{output} was begun with other arguments: {'; '.join(changed)}. Repeat the earlier ones, choose another "
            "--output, "
            "or start over with --fresh"
        )


def open_work(
    output: Path, source: Source, tokenizer: LoadedTokenizer, arguments: Mapping[str, Any], alone: bool = True
) -> Path:
    """Create the work folder of an output, or check that it belongs to the same arguments and the same source.

    Where nothing that differs is finished yet, as after a mistake in an argument or a damaged file, work begins with what is asked for
    now; but only if this process is `alone`: another machine may be at its part.
    """
    work = output / WORK_FOLDER
    bundles = [[asdict(unit) for unit in bundle] for bundle in source.bundles]
    plan = work / "plan.json"
    if plan.exists():
        earlier = json.loads(plan.read_text())
        if alone and not _kept(work, earlier, arguments, bundles):
            shutil.rmtree(work)
    if plan.exists():
        check_same(earlier["arguments"], arguments, output)
        if alone and _adopted(work, earlier["bundles"], bundles):
            write_text(plan, json.dumps({"arguments": arguments, "bundles": bundles}))
            return work
        if earlier["bundles"] != bundles:
            before, now = (list(chain.from_iterable(found)) for found in (earlier["bundles"], bundles))
            raise UserError(
                f"{output} was begun with another source, or {source.name} changed since: {len(before)} units then, "
                f"{len(now)} now, first difference {_first_difference(before, now)}. Start over with --fresh"
            )
        return work
    tokenizer.save(work / "tokenizer")
    write_text(plan, json.dumps({"arguments": arguments, "bundles": bundles}))
    return work


def _kept(work: Path, earlier: Mapping[str, Any], arguments: Mapping[str, Any], bundles: list[Any]) -> bool:
    """Whether the work folder holds documents, or is of the very same plan."""
    if earlier["arguments"] == arguments and earlier["bundles"] == bundles:
        return True
    results = (load_result(work, index) for index in range(len(earlier["bundles"])))
    return any(result is not None and result.chunks for result in results)


def _adopted(work: Path, before: list[Any], now: list[Any]) -> bool:
    """Whether bundles differ, but none that is finished."""
    changed = [index for index, (old, new) in enumerate(zip_longest(before, now)) if old != new]
    return bool(changed) and all(load_result(work, index) is None for index in changed)


def _first_difference(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    for old, new in zip_longest(before, now):
        if old != new:
            return f"{old} -> {new}"
    return "how they are bundled"


def check_complete(work: Path, num_bundles: int) -> None:
    """Refuse to go on while any bundle of the source is not encoded."""
    missing = [index for index in range(num_bundles) if load_result(work, index) is None]
    if missing:
        raise UserError(
            f"--merge: {len(missing)} of {num_bundles} bundles of the source are not encoded yet (the first is number"
            f" {missing[0]}): of n parts, --part i/n encodes the bundles i, i + n, i + 2n ...; run the missing one first"
        )


def remove_earlier(output: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    for pattern in ("train-?????.tar", "heldout-?????.tar"):
        for path in output.glob(pattern):
            path.unlink()
    for folder in (WORK_FOLDER, "tokenizer"):
        shutil.rmtree(output / folder, ignore_errors=True)
    remove_leftovers(output)


def remove_leftovers(output: Path) -> None:
    """Remove temporary files that killed runs left."""
    remove_unfinished(output, "*.tar")
    remove_unfinished(output, MANIFEST_NAME)
    remove_unfinished(output / "tokenizer", "*")
