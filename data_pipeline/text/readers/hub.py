"""Datasets of the Hugging Face hub, streamed by `datasets`: one row, its text column; nothing is kept but what is made of it."""

import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.core.errors import ENDINGS, UserError, reason
from data_pipeline.core.hub import use_hub
from data_pipeline.text.readers.base import Reader, Unit, text_of


class Hub(Reader):
    """`owner/name:configuration@revision#split`, the last three if need be. A unit is one of the files, or a share of them."""

    is_local = False
    file_names = re.compile(
        r"(?P<name>[\w-][\w.-]*(?:/[\w.-]+)?)(?::(?P<configuration>[\w.-]+))?(?:@(?P<revision>[\w./-]+?))?(?:#(?P<split>[\w.-]+))?"
    )

    def takes(self, location: str) -> bool:
        return self.file_names.fullmatch(location) is not None

    def units(self, location: str, unit_bytes: int) -> list[Unit]:
        num_shards = load_streamed(location).num_shards
        return [self.unit(location, shard, num_shards, unit_bytes) for shard in range(num_shards)]

    def documents(self, unit: Unit, text_field: str) -> Iterator[str | None]:
        shard = load_streamed(unit.location).shard(num_shards=unit.stop, index=unit.start)
        num_rows, num_texts, fields = 0, 0, []
        for record in _told(shard, unit.location):
            text = text_of(record, text_field, f"{unit.location}, row {num_rows} of part {unit.start}")
            num_rows, num_texts, fields = num_rows + 1, num_texts + (text is not None), list(record)
            yield text
        if num_rows and not num_texts:  # `datasets` fills a field that a file does not have with nulls
            raise UserError(
                f"source {unit.location}: {text_field!r} is null in all {num_rows} rows of part {unit.start} (found "
                f"{', '.join(map(repr, fields[:12]))}); name the right one with --text-field"
            )


@functools.lru_cache(maxsize=1)  # else every unit would ask the hub for its list of files
def load_streamed(location: str) -> Any:
    """The streamed dataset. Raises UserError with what `datasets` says of the reason, and a remedy for it."""
    use_hub()
    from datasets import load_dataset

    matched = Hub.file_names.fullmatch(location)
    assert matched is not None
    name, configuration, revision, split = matched.group("name", "configuration", "revision", "split")
    try:
        with _files_of_the_repository():
            return load_dataset(name, configuration, split=split or "train", streaming=True, revision=revision)
    except (UserError, *ENDINGS):
        raise
    except BaseException as error:
        raise UserError(
            f"source {location}: no such local file or folder, and the Hugging Face hub does not give a dataset of that name "
            f"({reason(error)}); {_remedy(error)}"
        ) from error


@contextmanager
def _files_of_the_repository() -> Iterator[None]:
    """While a dataset is looked for, its README may name its files (data_files), but only its own: `datasets` takes an absolute path
    there for a file of this machine, and a URL for one of another.
    """
    from datasets import data_files

    resolve = data_files.resolve_pattern

    def resolve_within(pattern: str, *args: Any, **kwargs: Any) -> Any:
        place = pattern.rpartition("::")[2]
        is_outside = "://" in place or place.startswith(("/", "~")) or ".." in place.split("/")
        if is_outside and not place.startswith("hf://datasets/"):
            raise UserError(
                f"its README names the file {pattern!r:.200}, which is not one of the dataset's; take another dataset, or download it and"
                " give its folder"
            )
        return resolve(pattern, *args, **kwargs)

    data_files.resolve_pattern = resolve_within
    try:
        yield
    finally:
        data_files.resolve_pattern = resolve


def _told(records: Iterable[dict[str, Any]], location: str) -> Iterator[dict[str, Any]]:
    """The records; what goes wrong on the way is a UserError."""
    try:
        yield from records
    except (UserError, *ENDINGS):
        raise
    except BaseException as error:
        raise UserError(f"source {location}: the stream broke off ({reason(error)}); {_remedy(error)}") from error


def _remedy(error: BaseException) -> str:
    said = f"{type(error).__name__} {error}".lower()
    if "gated" in said or "401" in said or "403" in said:
        return "accept its terms on the hub and set HF_TOKEN, or give local files"
    if "unknown split" in said or "bad split" in said:
        return "choose another split with --split"
    if "config" in said:
        return "name one as owner/name:configuration"
    if any(word in said for word in ("connect", "offline", "timeout", "timed out", "resolve", "proxy", "network")):
        return "check the network, or give local files"
    if "notfound" in said or "not found" in said or "doesn't exist" in said or "404" in said:
        return "check the name (owner/name:configuration@revision), or give local files"
    return "run the same command again; if it recurs, download the files and give their folder"
