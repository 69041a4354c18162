"""300 random mutations of a prepared folder and its feature cache: each is refused in one line that names the file and the
remedy, or reads as if nothing had happened. None is accepted silently, none hangs, none ends in a traceback.

Half of them leave the manifest as it was, so that its hashes must tell. The others come with a manifest whose hashes were
made to fit: there the reader itself has to see what is wrong.
"""

import hashlib
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.features.cache import feature_members, load_cache, member_infos
from data_pipeline.features.codec import ExactCodec
from data_pipeline.format.manifest import FeatureManifest, Manifest, fingerprint
from data_pipeline.format.shards import write_shard
from data_pipeline.prepare.verify import verify
from data_pipeline.reading.batch import Split
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import FeatureRows, TokenRows
from data_pipeline.text.tokenization import train_tokenizer
from tests.data_pipeline import mutations
from tests.data_pipeline.conftest import ROW_TOKENS, VOCAB_SIZE, write_prepared

Damage = Callable[[bytes, np.random.Generator], tuple[str, Any]]
Reader = Callable[[Path], list]

SECONDS = 10
UNHASHED = {
    "manifest.json": ("fingerprint", "source", "text_field", "source_files", "statistics"),
    "features/manifest.json": ("fingerprint", "statistics"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder that passes `verify`, with the cache of a teacher of three exact features."""
    folder = tmp_path_factory.mktemp("fuzz")
    words = ["".join(letters) for letters in np.random.default_rng(0).choice(list("abcdefgh"), (400, 6))]
    tokenizer = train_tokenizer([" ".join(words)], VOCAB_SIZE)
    tokenizer.save(folder / "tokenizer")
    fields = write_prepared(folder, [3, 4, 3], [2]).model_copy(update={"tokenizer": tokenizer.info})
    manifest = fields.model_copy(update={"fingerprint": fingerprint(fields.content())})
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1))
    write_cache(folder / "features", manifest)
    return folder


def write_cache(folder: Path, tokens: Manifest) -> None:
    codec, rng = ExactCodec(feature_dim=3), np.random.default_rng(1)
    codec.save(folder / "codec.safetensors")
    splits: dict[str, list[dict]] = {}
    for split, shards in tokens.splits.items():
        splits[split] = []
        for info in shards:
            shape = (info.rows, ROW_TOKENS, codec.num_code_bytes)
            rows = zip(rng.integers(0, 256, shape, np.uint8), np.zeros(shape[:2], np.uint8))
            written = write_shard(folder / info.name, feature_members(codec, ROW_TOKENS), rows)
            splits[split].append({"name": info.name, **written._asdict()})
    features = FeatureManifest.create(
        tokens_fingerprint=tokens.fingerprint,
        row_tokens=ROW_TOKENS,
        members=member_infos(codec, ROW_TOKENS),
        teacher={"name": "none", "tokenizer_sha256": tokens.tokenizer.sha256},
        codec=codec.describe(),
        splits=splits,
        statistics={"mean_cosine": 1.0},
    )
    (folder / "manifest.json").write_text(features.model_dump_json(indent=1))


def read_tokens(folder: Path) -> list[list]:
    """All that training would see of the token shards; hashes are checked."""
    manifest = Manifest.load(folder)
    first_step(folder, None)
    found = []
    for split, shards in manifest.splits.items():
        rows = TokenRows(str(folder), manifest, split)
        for index, shard in enumerate(shards):
            tokens, lengths = rows.read(Span(0, index, 0, shard.rows))
            kept = [row[: windows.sum()].tolist() for row, windows in zip(tokens, lengths)]
            found.append([split, kept, [windows.tolist() for windows in lengths]])
    return sorted(found)


def read_features(folder: Path) -> list[list]:
    """All that training would see of the feature cache."""
    cache = load_cache(folder / "features", Manifest.load(folder))
    first_step(folder, folder / "features")
    found = []
    for split, shards in cache.manifest.splits.items():
        rows = FeatureRows(str(folder / "features"), cache.manifest, split)
        for index, shard in enumerate(shards):
            arrays = rows.read(Span(0, index, 0, shard.rows))
            found.append([split, *(arrays[name].tolist() for name in ("features", "scales"))])
    return sorted(found)


def first_step(folder: Path, features: Path | None) -> None:
    options = {"streams": 1, "rows_per_step": 4, "micro_batch_rows": 2, "split": Split(kind="truncate"), "workers": 0}
    TrainLoader(folder, features, seed=0, **options).next_step()


def verified_tokens(folder: Path) -> list[list]:
    """The same, after everything that `prepare verify` checks."""
    list(verify(folder))
    return read_tokens(folder)


class Outcome(RuntimeError):
    """A mutation that was neither refused properly nor harmless."""


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Outcome(f"still busy after {SECONDS} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def refused(read: Reader, folder: Path, name: str, expected: list) -> bool:
    """Whether the folder is refused, in a line that matches `name` and gives a remedy. Raises Outcome if it is misread."""
    try:
        with time_limit():
            found = read(folder)
    except UserError as error:
        message = str(error)
        if not re.search(f"{re.escape(str(folder))}/{name}", message) or "again" not in message or "\n" in message:
            raise Outcome(f"a poor message: {message}") from None
        return True
    except Outcome:
        raise
    except Exception as error:
        raise Outcome(f"{type(error).__name__}: {error}") from error
    if found != expected:
        raise Outcome("accepted, but reads otherwise")
    return False


def fuzz(
    folder: Path, name: str, count: int, damage: list[Damage], read: Reader, fit: Callable | None = None, seed: int = 0
) -> float:
    """Mutate a file `count` times and read; `fit(folder, name, changed)` makes the manifest agree.

    Returns the share that was refused; fails if one was neither refused nor harmless.
    """
    expected = read(folder)
    files = {path: path.read_bytes() for path in (folder / name, (folder / name).parent / "manifest.json")}
    # A manifest that contradicts a shard and has a right fingerprint: nobody can know which of them is wrong.
    named = f"{Path(name).parent / '[a-z0-9/-]+'}\\.(json|tar|safetensors)" if fit is fit_tree else re.escape(name)
    failures, num_refused = [], 0
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        what, changed = damage[number % len(damage)](files[folder / name], rng)
        while changed == files[folder / name]:
            what, changed = damage[number % len(damage)](files[folder / name], rng)
        try:
            if fit is not None:
                changed = fit(folder, name, changed)
            (folder / name).write_bytes(changed)
            num_refused += refused(read, folder, named, expected)
        except Outcome as outcome:
            failures.append(f"{number}, {what}: {outcome}")
        finally:
            for path, content in files.items():
                path.write_bytes(content)
    assert not failures, "\n".join([f"{len(failures)} of {count} mutations of {name}:", *failures])
    return num_refused / count


def fit_shard(folder: Path, name: str, changed: bytes) -> bytes:
    """Write the changed shard's size and hash into its manifest."""
    path = (folder / name).parent / "manifest.json"
    tree = json.loads(path.read_bytes())
    for shard in (shard for shards in tree["splits"].values() for shard in shards):
        if shard["name"] == Path(name).name:
            shard |= {"bytes": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
    path.write_bytes(fit_tree(folder, str(path.relative_to(folder)), tree))
    return changed


def fit_tree(folder: Path, name: str, tree: Any) -> bytes:
    """A manifest's tree as JSON, with the fingerprint of what it says."""
    content = {key: value for key, value in tree.items() if key not in UNHASHED[name]}
    tokenizer = content.get("tokenizer")
    if isinstance(tokenizer, dict):
        content["tokenizer"] = {key: tokenizer.get(key) for key in ("sha256", "vocab_size", "eos_id")}
    tree["fingerprint"] = fingerprint(content)
    return json.dumps(tree).encode()


def tree_as_text(text: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    what, tree = mutations.damage_tree(text, rng)
    return what, json.dumps(tree).encode()


BYTES = [mutations.damage_structure, mutations.damage_contents, mutations.damage_archive]
SHARD = [mutations.damage_structure, mutations.damage_archive, mutations.damage_archive]
TEXT = [mutations.damage_text, tree_as_text]


def test_the_archives_written_here_are_the_format(folder: Path) -> None:
    """Otherwise mutated archives would be refused for something else than their mutation."""
    for name in ("train-00001.tar", "features/train-00001.tar"):
        data = (folder / name).read_bytes()
        assert mutations.archive(mutations.parse(data)) == data


@pytest.mark.parametrize(
    ("name", "count", "damage", "read", "fit", "least"),
    [
        ("train-00001.tar", 45, BYTES, read_tokens, None, 1.0),
        ("train-00001.tar", 60, SHARD, verified_tokens, fit_shard, 0.95),
        ("manifest.json", 45, TEXT, read_tokens, None, 0.8),
        ("manifest.json", 45, [mutations.damage_tree], verified_tokens, fit_tree, 0.6),
        ("features/train-00001.tar", 30, BYTES, read_features, None, 1.0),
        ("features/train-00001.tar", 30, SHARD, read_features, fit_shard, 0.95),
        ("features/manifest.json", 25, TEXT, read_features, None, 0.8),
        ("features/manifest.json", 20, [mutations.damage_tree], read_features, fit_tree, 0.4),
    ],
)
def test_mutations_are_refused_or_harmless(
    folder: Path, name: str, count: int, damage: list, read: Callable, fit: Callable | None, least: float
) -> None:
    assert fuzz(folder, name, count, damage, read, fit) >= least


def lie(tree: dict, **fields: Any) -> None:
    tree["splits"]["train"][0] |= fields


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tree: lie(tree, rows=10**30, windows=10**30, tokens=10**30), r"manifest\.json: splits\.train\.0\.rows"),
        (lambda tree: tree["splits"].update(heldout=[]), r"heldout-00000\.tar: the manifest names no such shard"),
        (lambda tree: tree.update(min_window=30), r"train-0000\d\.tar: row \d holds windows of"),
        (lambda tree: tree.update(max_window=5), r"train-0000\d\.tar: row \d holds windows of"),
        (lambda tree: tree["tokenizer"].update(vocab_size=600), r"tokenizer\.json has the vocab_size 512.* says 600"),
        (lambda tree: tree["tokenizer"].update(eos_id=5), r"tokenizer\.json has the eos_id 0.* says 5"),
        (lambda tree: lie(tree, windows=10), r"train-00000\.tar: holds 9 windows .* says 10"),
    ],
)
def test_manifests_that_contradict_the_rest_are_refused(folder: Path, change: Callable, named: str) -> None:
    original = (folder / "manifest.json").read_bytes()
    tree = json.loads(original)
    change(tree)
    (folder / "manifest.json").write_bytes(fit_tree(folder, "manifest.json", tree))
    try:
        with pytest.raises(UserError, match=named):
            verified_tokens(folder)
    finally:
        (folder / "manifest.json").write_bytes(original)


@pytest.mark.parametrize(
    "name", ["train-00001.tar", "features/train-00001.tar", "manifest.json", "features/manifest.json"]
)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_refused(folder: Path, name: str, make: Callable) -> None:
    kept = (folder / name).rename(folder / "kept")
    make(folder / name)
    try:
        assert refused(read_features if "features" in name else read_tokens, folder, re.escape(name), [])
    finally:
        (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
        kept.rename(folder / name)
