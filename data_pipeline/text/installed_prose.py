"""English prose that lies on every machine with Python: the default text of the quickstart, when no corpus and no
network is at hand.

Sources are pydoc's topics (the language reference) and the docstrings of the standard library and the installed
packages, read as text, never imported. Only paragraphs of real sentences stay: no code, tables, doctests or parameter
lists. The prose of one file is one document.
"""

import argparse
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from data_pipeline.core.errors import UserError, cli
from data_pipeline.core.storage import atomic_write, user_cache

MAX_BYTES = 8_000_000
_MIN_DOCUMENT_CHARACTERS = 200
_MAX_FILE_BYTES = 600_000  # larger ones are generated tables
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "__pycache__",
    "lib2to3",
    "idlelib",
    "_vendor",
    "site-packages",
    "node_modules",
    "generated",
}

_COMMON_TEXT = """
    a about after all also an and any are as at be because been before being but by can cannot could do does each either
    for from given has have how if in into is it its just like may more most must no not of on one only or other
    otherwise over same should since so some such than that the their them then there therefore these they this those
    to two under until up use used using was we were what when where whether which while who will with within without
    would you your
"""
_COMMON_WORDS = frozenset(_COMMON_TEXT.split())
_MARKUP = (
    (re.compile(r":[a-zA-Z:+-]+:`~?\.?([^`<]+?)(?:\s*<[^>`]*>)?`"), r"\1"),  # :class:`~module.Name`
    (re.compile(r"``([^`]*)``"), r"\1"),
    (re.compile(r"`([^`<]+?)(?:\s*<[^>`]*>)?`_{0,2}"), r"\1"),
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r"\s*\[[\w-]+\]_"), ""),  # footnote marks
    (re.compile(r"(?<!\w)(\*{1,3})(?=\S)([^*]+?)(?<=\S)\1(?!\w)"), r"\2"),
    (re.compile(r"(?<!\w)_(?=[A-Za-z])([^_*]+?)(?<=\S)_(?!\w)"), r"\1"),
    (re.compile(r"\s+"), " "),
)
_LIST_OR_CODE = re.compile(
    r"^\s*(?:>>>|\.\.\s|@|:\w+|[-*+•]\s|\d+[.)]\s|#|[|+=~^-]{3,}|\$ "
    r"|Args?:|Returns?:|Raises:|Yields?:|Examples?:|Note:?\s*$)"
)
_FIELD = re.compile(r"^\s*[\w*, .`]+\s?(?:\([^)]*\)\s*)?:(?:\s|$)")  # name: meaning, name (type): meaning, name : type
_RULE = re.compile(r"^\s*([-=~^\"'*#])\1{2,}\s*$")
_SENTENCE_END = re.compile(r"[.!?][\"')]?$")
_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_TRIPLE_QUOTED = re.compile(r"""(?P<quote>\"{3}|'{3})(?P<text>.*?)(?<!\\)(?P=quote)""", re.DOTALL)
_STRANGE = re.compile(r"[<>{}\[\]|\\=@^~#$%&*]|::|->|\.\.\.|\w\(|https?:|\w/\w+/")


def documents(max_bytes: int = MAX_BYTES, workers: int | None = None) -> Iterator[str]:
    """The documents, at most `max_bytes` of them, in an order that depends only on what is installed."""
    seen: set[bytes] = set()
    remaining = max_bytes
    for paragraphs in _extract_all(workers or os.cpu_count() or 1):
        fresh = [text for text in paragraphs if _is_new(text, seen)]
        document = "\n\n".join(fresh)
        if len(document) < _MIN_DOCUMENT_CHARACTERS:
            continue
        remaining -= len(document.encode())
        if remaining < 0:
            return
        yield document


def cached_path() -> Path:
    """A .jsonl file of the documents, written on first use and again whenever the installed packages change."""
    state = [sys.version, *sorted(path.name for folder in _folders() for path in folder.glob("*.dist-info"))]
    identity = hashlib.sha256("\n".join([*state, Path(__file__).read_text()]).encode()).hexdigest()[:16]
    path = user_cache() / f"installed-{identity}.jsonl"
    if not path.exists():
        write(path)
    return path


def write(path: Path, max_bytes: int = MAX_BYTES) -> tuple[int, int, int]:
    """Write the documents as .jsonl; returns the numbers of documents, bytes and words."""
    counts = [0, 0, 0]
    with atomic_write(path) as file:
        for document in documents(max_bytes):
            file.write(json.dumps({"text": document}).encode() + b"\n")
            counts = [counts[0] + 1, counts[1] + len(document.encode()), counts[2] + len(document.split())]
    if not counts[0]:
        raise UserError("no prose was found in the installed Python packages: give a text source with --source instead")
    return counts[0], counts[1], counts[2]


def prose_paragraphs(text: str) -> list[str]:
    """Paragraphs of real sentences in a docstring or a plain-text page, re-flowed, markup removed."""
    kept = []
    code_indent: int | None = None
    for block in re.split(r"\n\s*\n", textwrap.dedent(text).expandtabs()):
        lines = block.strip("\n").split("\n")
        indent = len(lines[0]) - len(lines[0].lstrip())
        if code_indent is not None and indent > code_indent:
            continue  # still inside the block that a `::` opened
        code_indent = indent if block.rstrip().endswith("::") else None
        if any(_LIST_OR_CODE.match(line) or _RULE.match(line) for line in lines) or _FIELD.match(lines[0]):
            continue
        if any(len(line) - len(line.lstrip()) != indent for line in lines[1:]):
            continue  # hanging indents are definitions, uneven ones code
        paragraph = _plain(" ".join(line.strip() for line in lines))
        if is_prose(paragraph):
            kept.append(paragraph)
    return kept


def is_prose(paragraph: str) -> bool:
    """Whether the paragraph is made of sentences: starts and ends like one, of words, with a natural share of common
    words.
    """
    tokens = paragraph.split()
    if len(tokens) < 8 or len(tokens) > 400 or not (paragraph[0].isupper() and _SENTENCE_END.search(paragraph)):
        return False
    if not paragraph.isascii() and sum(not c.isascii() for c in paragraph) > 0.01 * len(paragraph):
        return False
    bare = [token.strip(".,;:!?\"'()") for token in tokens]
    words = sum(bool(_WORD.fullmatch(token)) for token in bare)
    common = sum(token.lower() in _COMMON_WORDS for token in bare)
    return (
        words >= 0.9 * len(tokens)
        and common >= 0.3 * len(tokens)
        and len(_STRANGE.findall(paragraph)) <= 0.02 * len(tokens)
    )


def _plain(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _is_new(paragraph: str, seen: set[bytes]) -> bool:
    """Whether no paragraph before had the same words; names (capitals, digits, underscores) do not count, as templates
    vary only those.
    """
    signature = " ".join(re.findall(r"(?<![\w.])[a-z]+(?![\w(])", paragraph))
    digest = hashlib.blake2b(signature.encode(), digest_size=8).digest()
    if digest in seen:
        return False
    seen.add(digest)
    return True


def _folders() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(folder) for folder in dict.fromkeys(paths[name] for name in ("stdlib", "purelib", "platlib"))]


def _extract_all(workers: int) -> Iterator[list[str]]:
    """Prose of the topics, then of every Python file, in the order of the files."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield prose_paragraphs(topics[name])
    files = [str(path) for folder in _folders() for path in _python_files(folder)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_file_prose, files, chunksize=64)


def _python_files(folder: Path) -> Iterator[Path]:
    """Python files below the folder, in a stable order, without tests and vendored copies."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith((".", "test"))
        )
        for name in sorted(files):
            if name.endswith(".py") and not name.startswith("test"):
                yield Path(parent) / name


def _file_prose(path: str) -> list[str]:
    """Prose in the docstrings of a Python file; nothing if it cannot be read."""
    try:
        with open(path, "rb") as file:
            source = file.read(_MAX_FILE_BYTES + 1)
        if len(source) > _MAX_FILE_BYTES or source.count(b'"""') + source.count(b"'''") < 2:
            return []
    except OSError:
        return []
    texts = _docstrings(source.decode("utf-8", "replace"))
    return [paragraph for text in texts for paragraph in prose_paragraphs(inspect.cleandoc(text))]


def _docstrings(source: str) -> Iterator[str]:
    """Triple-quoted strings that begin their line: docstrings, nearly always.

    `ast` finds the same ones in five times the time (47 s of CPU for 12,000 files). What a stray quote lets through is not
    prose and goes with the rest.
    """
    for match in _TRIPLE_QUOTED.finditer(source):
        before = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
        if before.strip() in ("", "r", "R"):
            yield match["text"]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="textldm prose", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-bytes", type=int, default=MAX_BYTES)
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    """Write the English prose of the installed Python packages as .jsonl, one document a line."""
    arguments = make_parser().parse_args(argv)
    num_documents, num_bytes, num_words = write(arguments.output, arguments.max_bytes)
    print(f"{arguments.output}: {num_documents} documents, {num_bytes / 1e6:.2f} MB, {num_words} words")


if __name__ == "__main__":
    raise SystemExit(main())
