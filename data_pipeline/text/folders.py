"""Which files below a folder are the text. Every entry is read, left out for a reason that is told with a count, or refused.

| left out | |
|---|---|
| hidden | names that begin with a dot, and the waste bins and leavings of other systems, with all that lies below them |
| no reader | files of a kind that no reader takes, and what is no file |
| packed | archives (.tar, .zip), and files compressed in ways that no reader opens (.lz4): unpack them |
| beside text | .json and .csv where other files hold the text: often they describe those |
| another split | of files that names call train, validation and test, those that are not train |
| read already | a second name (a link) of a file or folder that is read, and `a.jsonl.zst` beside `a.jsonl` |
| prepared | what this command is writing, or wrote, for training |
| out of the folder | links to what does not lie below it, unless they are to be followed: a folder from elsewhere may lead to your files |

A guess (which kind of file, which split) that would leave out most of the bytes is refused: the user decides.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from data_pipeline.core.errors import UserError
from data_pipeline.core.pointers import pointer
from data_pipeline.format.manifest import MANIFEST_NAME, shard_name
from data_pipeline.text.readers.base import COMPRESSIONS, Reader, size_of
from data_pipeline.text.readers.registry import naming, reader_of
from data_pipeline.text.readers.streams import compression

ALL_SPLITS = "all"

_SYSTEM_FOLDERS = {
    *("__macosx", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("#recycle", "#snapshot", "@eadir", "~snapshot"),  # of network storage
    *("_temporary", "_delta_log", "_spark_metadata"),  # of Spark: what was not committed, and what describes
}
_UNREAD = ("lz4", "lzma", "br", "z", "lzo", "sz", "snappy")
_COMPRESSED = rf"(?:\.(?:{'|'.join(COMPRESSIONS)}|{'|'.join(_UNREAD)}))?"
_ENDING = re.compile(rf"(?:\.\w+)?{_COMPRESSED}$", re.IGNORECASE)
ARCHIVE = re.compile(
    rf"\.(?:(?:tar|cpio){_COMPRESSED}|tgz|tbz2?|txz|tzst|zip|7z|rar|whl|{'|'.join(_UNREAD)})$", re.IGNORECASE
)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_NAMES.items() for word in words}
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLIT_OF)})(?![a-z])")
_OUT = "out of the folder"
_NAMED = 4  # of a kind of what is left out


@dataclass(frozen=True)
class Found:
    """A file, or a folder that a reader takes whole; of an archive the reader is None.

    Attributes:
        real: its path without links, of which it is free unless `linked`.
        kind: what it is counted as: its ending, or of a folder what its reader is called.
    """

    path: str
    real: str
    linked: bool
    kind: str
    size: int
    reader: Reader | None


@dataclass
class Listing:
    """What a folder holds: `taken` in the order of the paths, and how many entries were left out, by (reason, kind or name)."""

    taken: list[Found] = field(default_factory=list)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def leave(self, reason: str, files: list[Found]) -> None:
        """Move files from the taken ones to those left out."""
        gone = {file.path for file in files}
        self.taken = [file for file in self.taken if file.path not in gone]
        self.left.update((reason, file.kind) for file in files)

    def leave_all(self, reason: str, entry: os.DirEntry[str]) -> None:
        """Leave out a file, or a folder with the files below it, links not followed."""
        num_files = 1
        if entry.is_dir(follow_symlinks=False):
            below = [
                os.path.join(place, name)
                for place, folders, files in os.walk(entry.path)
                for name in (*folders, *files)
            ]
            num_files = sum(not os.path.isdir(path) or os.path.islink(path) for path in below)
        if num_files:
            self.left[reason, entry.name] += num_files

    def counts(self) -> dict[str, int]:
        """Statistics of the manifest: `files_found` is the sum of the others."""
        reasons: Counter[str] = Counter()
        for (reason, _), count in self.left.items():
            reasons[f"files_left_out_{reason.replace(' ', '_')}"] += count
        return {
            "files_found": len(self.taken) + sum(reasons.values()),
            "files_read": len(self.taken),
            **dict(sorted(reasons.items())),
        }

    def told(self) -> str:
        """The same in one line."""
        line = f"{len(self.taken) + self.left.total()} files, reads {_listed(file.kind for file in self.taken)}"
        return f"{line}; leaves out {self.told_left()}" if self.left else line

    def told_left(self) -> str:
        """What is left out, and why."""
        reasons: dict[str, Counter[str]] = {}
        for (reason, kind), count in sorted(self.left.items()):
            reasons.setdefault(reason, Counter())[kind] = count
        return ", ".join(f"{_listed(kinds.elements())} ({reason})" for reason, kinds in reasons.items())


def list_folder(
    folder: str, split: str | None = None, output: str | None = None, follow_links: bool = False
) -> Listing:
    """Find the text below a folder.

    Args:
        split: which of the splits that names tell apart to read ("all": do not tell them apart); None: train, where that
            leaves out less than half.
        output: a folder that is being written, which is no source.
        follow_links: out of the folder too; else only within it, and within a repository of the hub's cache.

    Raises:
        UserError: nothing is there, a folder or file cannot be looked at, pointers instead of files, or a guess would drop most.
    """
    home = None if follow_links else _home_of(folder)
    listing = _walk(folder, output, home)
    _leave_links_out_of(folder, listing, home)
    _check_pointers(folder, listing.taken)
    _leave_second_names(listing)
    found, packed = list(listing.taken), [file for file in listing.taken if file.reader is None]
    listing.leave("packed", packed)
    if any(not file.reader.often_metadata for file in listing.taken if file.reader):
        listing.leave("beside text", [file for file in listing.taken if file.reader and file.reader.often_metadata])
    if not listing.taken:
        raise UserError(
            f"source {folder}: holds no file that can be read as text (found {listing.told_left() or 'nothing'})"
            + "".join(f"; {unpacking(file.path)}" for file in packed[:1])
        )
    if 2 * _bytes(listing.taken) < _bytes(found):
        raise UserError(
            f"source {folder}: holds {_listed(file.kind for file in found)}, and either "
            f"{_listed(file.kind for file in listing.taken)} or the others, which are larger, may be the text; give a folder "
            "that holds one of them" + "".join(f"; {unpacking(file.path)}" for file in packed[:1])
        )
    _choose_split(folder, listing, split)
    return listing


def _walk(folder: str, output: str | None, home: str | None = None) -> Listing:
    """All entries: what readers take and archives (without a reader) are taken for now, the rest is left out.

    Real folders come first, links to folders after them: so a folder is read under its own name, each once, and circles end.
    Folders out of `home` are not looked into.
    """
    listing = Listing()
    root = os.path.realpath(folder)
    real_output = os.path.realpath(output) if output is not None else None
    seen = {root}
    places = [(folder, root, False)]
    links: list[tuple[str, str]] = []
    while places or links:
        if not places:
            path, real = links.pop(0)
            if real in seen or f"{root}{os.sep}".startswith(f"{real.rstrip(os.sep)}{os.sep}"):
                listing.left["read already", "links to folders"] += 1
                continue
            seen.add(real)
            places.append((path, real, True))
        place, real_place, linked = places.pop()
        for entry in _entries(folder, place):
            is_link = entry.is_symlink()
            real = os.path.realpath(entry.path) if is_link else os.path.join(real_place, entry.name)
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM_FOLDERS:
                listing.leave_all("hidden", entry)
            elif real == real_output or _is_prepared(entry.path):
                listing.leave_all("prepared", entry)
            elif (reader := reader_of(entry.path)) or (ARCHIVE.search(entry.name) and os.path.isfile(entry.path)):
                listing.taken.append(_found(entry.path, real, linked or is_link, reader))
            elif not os.path.isdir(entry.path):
                kind = (
                    _ending(entry.name)
                    if os.path.isfile(entry.path)
                    else "links to nothing"
                    if is_link
                    else "pipes and devices"
                )
                listing.left["no reader", kind] += 1
            elif is_link and not _is_within(home, real):
                listing.left[_OUT, "links to folders"] += 1
            elif is_link:
                links.append((entry.path, real))
            elif real in seen:
                listing.left["read already", "folders"] += 1
            else:
                seen.add(real)
                places.append((entry.path, real, linked))
    listing.taken.sort(key=lambda file: file.path)
    return listing


def _home_of(folder: str) -> str:
    """Where links in a folder may lead to: below it; of the hub's cache, in which files are links, below the repository."""
    root = os.path.realpath(folder)
    # <repository>/snapshots/<commit>/file -> ../../blobs/...
    is_snapshot = os.path.basename(os.path.dirname(root)) == "snapshots"
    return os.path.dirname(os.path.dirname(root)) if is_snapshot else root


def _is_within(home: str | None, real: str) -> bool:
    return home is None or os.path.commonpath([home, real]) == home


def _leave_links_out_of(folder: str, listing: Listing, home: str | None) -> None:
    """Leave out files by links that lead elsewhere. Raises: UserError, where that is most of the text."""
    before = listing.taken
    outside = [file for file in before if file.linked and not _is_within(home, file.real)]
    listing.leave(_OUT, outside)
    if 2 * _bytes(outside) > _bytes(before) or (not listing.taken and listing.left[_OUT, "links to folders"]):
        raise UserError(
            f"source {folder}: what it holds are links to elsewhere"
            + "".join(f", the first {file.path} to {file.real}" for file in outside[:1])
            + "; if that is meant, add --follow-links, else name the folder that holds the files"
        )


def _is_prepared(folder: str) -> bool:
    """Whether it holds shards and their manifest."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in (MANIFEST_NAME, shard_name("train", 0)))


def _found(path: str, real: str, linked: bool, reader: Reader | None) -> Found:
    """An entry whose name promises text. Raises UserError if there is none behind it."""
    is_folder = os.path.isdir(path)
    if not is_folder and not os.path.isfile(path):
        what = (
            f"a link to {os.readlink(path)}, where nothing can be seen" if os.path.islink(path) else "a pipe or device"
        )
        raise UserError(f"source {path}: is {what}; mend it, or take it out of the source")
    kind = f"{reader.name} dataset" if reader and is_folder else _ending(path)
    return Found(path, real, linked, kind, size_of(path), reader)


def _entries(folder: str, place: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(place) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"source {folder}: the folder {place} cannot be listed ({error.strerror}); give this user the right to, or take it "
            "out of the source"
        ) from error


def _check_pointers(folder: str, files: list[Found]) -> None:
    found = []
    for file in files:
        with naming(file.path):
            if not os.path.isdir(file.path) and (what := pointer(file.path)):
                found.append((file.path, what))
    if found:
        raise UserError(
            f"source {folder}: {len(found)} of {len(files)} files hold no text, the first {found[0][0]}: a {found[0][1]} instead of "
            "the contents, which were not fetched"
        )


def _leave_second_names(listing: Listing) -> None:
    """Of several names of one file the first that is no link is read; of a file and its compressed copy the file."""
    first: dict[str, Found] = {}
    for file in sorted(listing.taken, key=lambda file: (file.linked, file.path)):
        first.setdefault(_identity(file), file)
    kept = {file.path for file in first.values()}
    names = {file.path for file in listing.taken}
    copies = {path for path in names if compression(path) and path.rpartition(".")[0] in names}
    listing.leave("read already", [file for file in listing.taken if file.path not in kept - copies])


def _identity(file: Found) -> str:
    """The same for all names of a file, hard links included."""
    with naming(file.path):
        status = os.stat(file.path)
    return f"{status.st_dev} {status.st_ino}" if status.st_nlink > 1 and not os.path.isdir(file.path) else file.real


def _choose_split(folder: str, listing: Listing, split: str | None) -> None:
    """Leave out all but the split that is asked for, or train where names tell splits apart."""
    splits = {file.path: _split_of(os.path.relpath(file.path, folder)) for file in listing.taken}
    named = Counter(name for name in splits.values() if name)
    if split is not None:
        wanted = _SPLIT_OF.get(split.lower(), split)
        if split == ALL_SPLITS:
            return
        if not named[wanted]:
            raise UserError(
                f"source {folder}: no file's name says that it is of split {split!r} (found {_listed(named.elements()) or 'no splits'}); "
                f"choose one of these, or --split {ALL_SPLITS}"
            )
    else:
        wanted = "train"
        is_partition = 2 * _bytes(file for file in listing.taken if splits[file.path]) >= _bytes(listing.taken)
        if not is_partition or not named["train"] or len(named) == 1:
            return  # titles of texts more likely than names of splits; or nothing to choose
    kept = [file for file in listing.taken if splits[file.path] == wanted]
    if split is None and 2 * _bytes(kept) < _bytes(listing.taken):
        raise UserError(
            f"source {folder}: names tell splits apart ({_listed(named.elements())} of {len(listing.taken)} files), and train alone would "
            f"leave out most of the text; choose with --split train, --split validation, --split test or --split {ALL_SPLITS}"
        )
    listing.leave("another split", [file for file in listing.taken if splits[file.path] != wanted])


def _split_of(path: str) -> str | None:
    """The split that a relative path names, in its last word that does: `test/c4-train.00000-of-00010` is of train."""
    words = _SPLIT_WORD.findall(path.lower())
    return _SPLIT_OF[words[-1]] if words else None


def _bytes(files: Iterable[Found]) -> int:
    return sum(file.size for file in files)


def _ending(path: str) -> str:
    found = _ENDING.search(os.path.basename(path))
    return found[0].lower() if found and found[0] else "without ending"


def _listed(kinds: Iterable[str]) -> str:
    """How many there are of each, the most frequent first."""
    counts = Counter(kinds)
    named = [f"{count} {kind}" for kind, count in counts.most_common(_NAMED)]
    rest = counts.total() - sum(count for _, count in counts.most_common(_NAMED))
    return ", ".join(named + [f"{rest} others"] * (rest > 0))


def unpacking(path: str) -> str:
    """How to read what an archive holds; "" of what is none."""
    name = os.path.basename(path)
    if not ARCHIVE.search(name):
        return ""
    ending = name.rpartition(".")[2].lower()
    if ending in _UNREAD:
        return f"the compression .{ending} is not read: decompress it, or compress anew with gzip, zstd, bzip2 or xz"
    command = {"zip": "unzip", "7z": "7z x", "rar": "unrar x"}.get(ending, "tar -xf")
    return f"archives are not read: unpack them into a folder and give that, for example `{command} {name}`"
