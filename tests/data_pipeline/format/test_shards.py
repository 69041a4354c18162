"""Shards are plain, reproducible tars that stock tools read, and no damaged one is accepted."""

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.errors import UserError
from data_pipeline.format.manifest import Manifest
from data_pipeline.format.shards import Member, Shard, Written, shard_bytes, token_members, write_shard
from data_pipeline.reading.order import Span
from data_pipeline.reading.shard_pool import TokenRows
from tests.data_pipeline.conftest import ROW_TOKENS, random_row, write_prepared

MEMBERS = token_members(ROW_TOKENS, "uint16")


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, Written, list]:
    rng = np.random.default_rng(0)
    rows = [random_row(rng) for _ in range(12)]
    path = tmp_path / "train-00000.tar"
    return path, write_shard(path, MEMBERS, rows), rows


def open_shard(path: Path, written: Written, sha256: bool = True) -> Shard:
    return Shard(path, MEMBERS, written.rows, written.bytes, written.sha256 if sha256 else None)


def test_round_trip(shard: tuple) -> None:
    path, written, rows = shard
    reader = open_shard(path, written)
    assert np.array_equal(reader.dense("tokens", 2, 9), [tokens for tokens, _ in rows[2:9]])
    lengths, counts = reader.ragged("lengths", 2, 9)
    assert lengths.tolist() == [length for _, row in rows[2:9] for length in row]
    assert counts.tolist() == [len(row) for _, row in rows[2:9]]
    assert reader.dense("tokens", 11, 12).shape == (1, ROW_TOKENS)


def test_its_size_is_known_before_it_is_written(tmp_path: Path) -> None:
    members = [Member("features", "uint8", (64, 5)), Member("scales", "uint8", (64,))]
    row = [np.zeros((64, 5), np.uint8), np.ones(64, np.uint8)]
    for num_rows in (1, 4, 5, 6, 40):  # 2,048 bytes a row: 5 fill a record of 10,240
        written = write_shard(tmp_path / "a.tar", members, [row] * num_rows)
        assert shard_bytes(members, num_rows) == written.bytes == (tmp_path / "a.tar").stat().st_size
        assert Shard(tmp_path / "a.tar", members, *written).index.stride


def test_rows_of_uneven_size_are_read_too(tmp_path: Path) -> None:
    """More windows than fit one tar block make rows of different sizes, which cannot be one strided view."""
    members = token_members(400, "uint32")
    rows = [
        (np.arange(400, dtype=np.uint32) + row, np.ones(count, np.int32))
        for row, count in enumerate([3, 200, 1, 97, 96, 400])
    ]
    written = write_shard(tmp_path / "a.tar", members, rows)
    reader = Shard(tmp_path / "a.tar", members, *written)
    assert np.array_equal(reader.dense("tokens", 0, 6), [tokens for tokens, _ in rows])
    assert reader.ragged("lengths", 0, 6)[1].tolist() == [3, 200, 1, 97, 96, 400]


def test_even_shards_are_indexed_at_once_and_to_the_same_end(shard: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    path, written, _ = shard
    fast = Shard(path, MEMBERS, written.rows, written.bytes, None)
    assert fast.index.stride
    monkeypatch.setattr(Shard, "_even_index", lambda *_: None)
    slow = Shard(path, MEMBERS, written.rows, written.bytes, None)
    for name in ("tokens", "lengths"):
        expected = fast.index.places[name][0] + fast.index.stride * np.arange(written.rows)
        assert np.array_equal(slow.index.places[name], expected)
    for start, stop in ((0, 12), (3, 4), (5, 9), (7, 7)):
        assert np.array_equal(fast.dense("tokens", start, stop), slow.dense("tokens", start, stop))
        both = zip(fast.ragged("lengths", start, stop), slow.ragged("lengths", start, stop), strict=True)
        assert all(np.array_equal(a, b) for a, b in both)


def test_bytes_depend_on_the_rows_alone(shard: tuple, tmp_path: Path) -> None:
    path, written, rows = shard
    again = write_shard(tmp_path / "other name.tar", MEMBERS, iter(rows))
    assert again == written
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert written.sha256 == "741791028877251592b11607c83e865e2af320f50b97f867bcabd01264790fa7"


def test_tarfile_and_numpy_read_it(shard: tuple) -> None:
    path, _, rows = shard
    with tarfile.open(path) as archive:
        names = archive.getnames()
        assert names[:3] == ["000000000.tokens.npy", "000000000.lengths.npy", "000000001.tokens.npy"]
        for name in names:
            file = archive.extractfile(name)
            assert file is not None
            array = np.load(io.BytesIO(file.read()), allow_pickle=False)
            expected = rows[int(name[:9])][0 if "tokens" in name else 1]
            assert array.dtype == expected.dtype
            assert np.array_equal(array, expected)


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar command")
def test_the_tar_command_reads_it(shard: tuple, tmp_path: Path) -> None:
    path, _, rows = shard
    subprocess.run(["tar", "xf", str(path), "-C", str(tmp_path)], check=True)
    assert np.array_equal(np.load(tmp_path / "000000004.tokens.npy"), rows[4][0])


def test_stock_webdataset_reads_it(shard: tuple) -> None:
    webdataset = pytest.importorskip("webdataset")
    path, _, rows = shard
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"{row:09d}" for row in range(12)]
    assert all(np.array_equal(sample["tokens.npy"], rows[i][0]) for i, sample in enumerate(samples))
    assert all(np.array_equal(sample["lengths.npy"], rows[i][1]) for i, sample in enumerate(samples))


def test_webdataset_keys_are_what_numpy_wrote(tmp_path: Path) -> None:
    """Our .npy header differs from NumPy's in padding at most."""
    member = Member("features", "float16", (4, 3))
    array = np.arange(12, dtype=np.float16).reshape(4, 3)
    write_shard(tmp_path / "a.tar", [member], [(array,)])
    buffer = io.BytesIO()
    np.save(buffer, array)
    with tarfile.open(tmp_path / "a.tar") as archive:
        data = archive.extractfile("000000000.features.npy").read()  # type: ignore[union-attr]
    assert data == buffer.getvalue()


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def rows():
        yield random_row(np.random.default_rng(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.tar", MEMBERS, rows())
    assert list(tmp_path.iterdir()) == []


def test_wrong_arrays_cannot_be_written(tmp_path: Path) -> None:
    tokens, lengths = random_row(np.random.default_rng(0))
    for wrong in ((tokens[:-1], lengths), (tokens.astype(np.uint32), lengths), (tokens, lengths.astype(np.int64))):
        with pytest.raises(ValueError, match="expected"):
            write_shard(tmp_path / "a.tar", MEMBERS, [wrong])
    assert list(tmp_path.iterdir()) == []


def test_a_changed_bit_is_refused_by_the_hash(shard: tuple) -> None:
    path, written, _ = shard
    data = bytearray(path.read_bytes())
    data[1000] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00000.tar: SHA-256 .* the manifest says"):
        open_shard(path, written)


def test_mutations_are_refused_or_harmless_even_without_hashes(tmp_path: Path) -> None:
    """300 random mutations with verify off: whatever the reader still accepts must be rows that training can use."""
    manifest = write_prepared(tmp_path, [6], [1])
    path = tmp_path / manifest.splits["train"][0].name
    original = path.read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for number in range(300):
        path.write_bytes(mutated(original, rng, number))
        message = refusal(lambda: TokenRows(str(tmp_path), manifest, "train", verify=False).read(Span(0, 0, 0, 6)))
        if message:
            refused += 1
            assert str(path) in message
            assert "prepare the data again" in message
            continue
        tokens, lengths = TokenRows(str(tmp_path), manifest, "train", verify=False).read(Span(0, 0, 0, 6))
        assert tokens.shape == (6, ROW_TOKENS)
        assert tokens.max() < manifest.tokenizer.vocab_size
        assert all(row.min() > 0 and row.sum() <= ROW_TOKENS for row in lengths)
    assert refused > 200
    for number in range(300):
        path.write_bytes(mutated(original, rng, number))
        if path.read_bytes() != original:
            with pytest.raises(UserError):
                TokenRows(str(tmp_path), manifest, "train", verify=True).read(Span(0, 0, 0, 6))


def refusal(action: Callable[[], object]) -> str:
    """Message of the UserError that the action raises, empty if it raises none."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def mutated(original: bytes, rng: np.random.Generator, number: int) -> bytes:
    """Bit flips, truncations, insertions, blocks moved, doubled or zeroed, other names, other types."""
    data = bytearray(original)
    place, block = int(rng.integers(len(data))), 512 * int(rng.integers(len(data) // 512))
    match number % 8:
        case 0:
            data[place] ^= 1 << int(rng.integers(8))
        case 1:
            return bytes(data[:place])
        case 2:
            return bytes(data) + bytes(512)
        case 3:
            data[block : block + 512] = bytes(512)
        case 4:
            data[block:block] = data[:512]
        case 5:
            return bytes(data).replace(b"000000003.", b"../../etc.", 1)
        case 6:
            return bytes(data).replace(b"'<i4'", b"'|O' ", 1)
        case 7:
            return bytes(data).replace(b"000000002.lengths", b"000000001.lengths", 1)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "replacement", "offence"),
    [
        (b"000000000.tokens.npy", b"../../x/y.tokens.npy", "../../x/y.tokens.npy"),
        (b"'<u2'", b"'|O' ", "not the expected array of uint16"),
        (b"ustar\x0000", b"ustar\x0001", "plain file"),
    ],
)
def test_offences_are_named(shard: tuple, name: bytes, replacement: bytes, offence: str) -> None:
    path, written, _ = shard
    path.write_bytes(path.read_bytes().replace(name, replacement, 1))
    with pytest.raises(UserError) as caught:
        open_shard(path, written, sha256=False)
    assert offence in str(caught.value)


def test_bytes_behind_the_rows_are_named(shard: tuple) -> None:
    path, written, _ = shard
    for tail, extra in ((bytes(512), 512), (b"x", 1)):
        path.write_bytes(path.read_bytes()[: written.bytes] + tail)
        with pytest.raises(UserError, match=f"{extra} bytes too many behind the 12 rows"):
            Shard(path, MEMBERS, written.rows, written.bytes + len(tail), None)
    path.write_bytes(path.read_bytes()[: written.bytes - 1] + b"x")
    with pytest.raises(UserError, match="or no end mark"):
        open_shard(path, written, sha256=False)


def test_missing_and_resized_files_are_refused(shard: tuple) -> None:
    path, written, _ = shard
    data = path.read_bytes()
    path.write_bytes(data[:-512])
    with pytest.raises(UserError, match="bytes, but the manifest says"):
        open_shard(path, written)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        open_shard(path, written)


def test_manifest_mutations_are_refused(tmp_path: Path) -> None:
    write_prepared(tmp_path, [6, 3], [1])
    path = tmp_path / "manifest.json"
    original = path.read_bytes()
    manifest = Manifest.load(tmp_path)
    rng = np.random.default_rng(2)
    for _ in range(300):
        data = bytearray(original)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(7))
        path.write_bytes(data if rng.random() < 0.8 else original[: int(rng.integers(len(original)))])
        message = refusal(lambda: Manifest.load(tmp_path))
        if message:
            assert "manifest.json" in message
            assert "again" in message
        else:
            assert Manifest.load(tmp_path).content() == manifest.content()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('"train-00001.tar"', '"../00001.tar"', "splits.train.1.name"),
        ('"train-00001.tar"', '"train-00007.tar"', "train-00007"),
        ('"row_tokens": 64', '"row_tokens": "64"', "row_tokens"),
        ('"row_tokens": 64', '"row_tokens": 64, "row_tokens": 65', "duplicate"),
        ('"seed": 0', '"seed": 1', "fingerprint"),
        ('"format_version": 1', '"format_version": 2', "format_version"),
    ],
)
def test_manifest_offences_are_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    write_prepared(tmp_path, [6, 3], [1])
    path = tmp_path / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=named):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("even", [True, False])
def test_a_shard_opened_again_is_checked_again_only_if_its_file_changed(tmp_path: Path, even: bool) -> None:
    path, members = tmp_path / "a.tar", token_members(400, "uint32")
    windows = [3, 20, 1] if even else [3, 200, 1]  # more windows than fit one tar block: rows of different sizes
    rows = [(np.arange(400, dtype=np.uint32) + row, np.full(n, row + 1, np.int32)) for row, n in enumerate(windows)]
    written = write_shard(path, members, rows)
    index = Shard(path, members, *written).index
    assert (index.stride > 0) == even
    changed = path.stat().st_mtime_ns
    data = bytearray(path.read_bytes())
    data[3] ^= 1  # in the first header
    path.write_bytes(data)
    os.utime(path, ns=(changed, changed))  # as if nothing had happened: nobody looks
    again = Shard(path, members, *written, index=index)
    assert again.index is index
    assert np.array_equal(again.dense("tokens", 1, 3), [tokens for tokens, _ in rows[1:]])
    lengths, counts = again.ragged("lengths", 1, 3)
    assert lengths.tolist() == [2] * windows[1] + [3] * windows[2]
    assert counts.tolist() == windows[1:]
    os.utime(path, ns=(changed, changed + 1))
    with pytest.raises(UserError, match="SHA-256"):
        Shard(path, members, *written, index=index)
    with pytest.raises(UserError, match=r"expected 000000000\.tokens\.npy"):
        Shard(path, members, written.rows, written.bytes, None, index)
    path.write_bytes(data[:-1])
    os.utime(path, ns=(changed, changed))
    with pytest.raises(UserError, match="bytes, but the manifest says"):
        Shard(path, members, *written, index=index)


@pytest.mark.parametrize(("verify", "offence"), [(True, "SHA-256"), (False, "manifest says")])
def test_a_shard_that_changes_between_two_passes_is_refused(tmp_path: Path, verify: bool, offence: str) -> None:
    manifest = write_prepared(tmp_path, [4, 4], [1])
    rows = TokenRows(str(tmp_path), manifest, "train", verify=verify, capacity=1)
    kept = rows.read(Span(0, 0, 0, 4))[0].copy()
    rows.read(Span(0, 1, 0, 4))
    assert np.array_equal(rows.read(Span(0, 0, 0, 4))[0], kept)
    rows.read(Span(0, 1, 0, 4))
    (tmp_path / "train-00001.tar").replace(tmp_path / "train-00000.tar")  # another good shard of the same size
    with pytest.raises(UserError, match=rf"train-00000\.tar: .*{offence}"):
        rows.read(Span(0, 0, 0, 4))
