"""Prepared folders behind URLs: the same batches, a bounded cache, patience with a bad network and clear words at its end."""

import contextlib
import http.server
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import pytest

from data_pipeline.core import storage
from data_pipeline.core.errors import UserError
from data_pipeline.core.storage import ShardFiles, atomic_folder, atomic_write, remove_unfinished, write_text
from data_pipeline.format.manifest import Manifest
from data_pipeline.reading.batch import Split
from data_pipeline.reading.loader import TrainLoader


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files; the first requests of each address fail, the next is cut short."""

    failures = 0
    requests: list[str] = []  # noqa: RUF012 (shared on purpose)

    def do_GET(self) -> None:
        self.requests.append(self.path)
        seen = self.requests.count(self.path)
        if seen <= self.failures:
            self.send_error(503)
        elif seen == self.failures + 1 and self.failures:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(prepared: Path) -> Iterator[str]:
    Handler.requests, Handler.failures = [], 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(prepared))) as instance:
        threading.Thread(target=instance.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_RETRY_SECONDS", (0.01, 0.02, 0.03))


def tickets_and_tokens(data: object, cache: Path, **changes: object) -> list:
    loader = TrainLoader(
        str(data), None, seed=1, streams=5, rows_per_step=10, micro_batch_rows=10, split=Split(kind="context"),
        cache_dir=str(cache), **changes,
    )  # fmt: skip
    with loader:
        batches = [batch for step in islice(loader, 6) for batch in step]
    return [(batch.rows, batch.tokens_T.tolist(), batch.segment_lengths) for batch in batches]


def test_http_gives_the_same_batches_and_downloads_once(prepared: Path, server: str, tmp_path: Path) -> None:
    expected = tickets_and_tokens(prepared, tmp_path)
    assert tickets_and_tokens(server, tmp_path) == expected
    shards = [path for path in Handler.requests if path.endswith(".tar")]
    assert tickets_and_tokens(server, tmp_path) == expected
    assert [path for path in Handler.requests if path.endswith(".tar")] == shards
    assert len(set(shards)) == len(shards) == len(list(tmp_path.glob("*.tar")))


def test_a_cache_smaller_than_the_data_stays_small(prepared: Path, server: str, tmp_path: Path) -> None:
    limit = 45_000  # two of the larger shards
    assert tickets_and_tokens(server, tmp_path, cache_gigabytes=limit / 1e9) == tickets_and_tokens(prepared, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit


def test_what_was_not_used_for_longest_goes_first_and_use_changes_nothing(
    prepared: Path, server: str, tmp_path: Path
) -> None:
    infos = Manifest.load(prepared).splits["train"][:3]
    files = ShardFiles(server, str(tmp_path), cache_gigabytes=(sum(info.bytes for info in infos) - 1) / 1e9)
    first, second = (files.path(info.name, info.bytes, info.sha256) for info in infos[:2])
    for path, then in ((first, 10), (second, 20)):
        os.utime(path, ns=(then, 5))
    assert files.path(infos[0].name, infos[0].bytes, infos[0].sha256) == first
    assert first.stat().st_mtime_ns == 5  # else an open shard's index would be worth nothing
    files.path(infos[2].name, infos[2].bytes, infos[2].sha256)
    assert first.exists()
    assert not second.exists()


def test_failing_and_cut_answers_are_retried(prepared: Path, server: str, tmp_path: Path) -> None:
    Manifest.load(server)
    Handler.failures = 2
    manifest = Manifest.load(prepared)
    info = manifest.splits["train"][0]
    path = ShardFiles(server, str(tmp_path)).path(info.name, info.bytes, info.sha256)
    assert path.read_bytes() == (prepared / info.name).read_bytes()
    assert Handler.requests.count(f"/{info.name}") == 4


def test_a_dead_server_is_named_at_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/.*after 4 attempts.*check the address"):
        ShardFiles("http://127.0.0.1:9", str(tmp_path)).path("train-00000.tar", 5, "0" * 64)


def test_missing_files_are_not_retried(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no finished folder"):
        Manifest.load(server + "/nowhere")
    with pytest.raises(UserError, match="the manifest names it"):
        ShardFiles(server, str(tmp_path)).path("train-99999.tar", 5, "0" * 64)
    assert len(Handler.requests) == 2


def test_other_contents_behind_the_url_are_refused(server: str, tmp_path: Path) -> None:
    info = Manifest.load(server).splits["train"][0]
    with pytest.raises(UserError, match="SHA-256"):
        ShardFiles(server, str(tmp_path)).path(info.name, info.bytes, "0" * 64)
    assert not list(tmp_path.iterdir())


def test_a_cached_file_that_rots_is_fetched_again(prepared: Path, server: str, tmp_path: Path) -> None:
    expected = tickets_and_tokens(server, tmp_path)
    first = expected[0][0][0]  # some cached shards were only read ahead, and need not be read again
    shard = Manifest.load(prepared).splits[first.split][first.shard]
    path = tmp_path / f"{shard.sha256}.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    requests = len(Handler.requests)
    assert tickets_and_tokens(server, tmp_path) == expected
    assert [name for name in Handler.requests[requests:] if name.endswith(".tar")] == [f"/{shard.name}"]
    assert path.read_bytes() != bytes(data)


def test_other_schemes_go_through_fsspec(prepared: Path, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(prepared) + "/", "/data/", recursive=True)
    assert tickets_and_tokens("memory://data", tmp_path) == tickets_and_tokens(prepared, tmp_path)
    with pytest.raises(UserError, match="nosuch://"):
        Manifest.load("nosuch://data")


def test_what_is_no_error_of_the_network_is_not_retried() -> None:
    calls = []

    def interrupted() -> None:
        calls.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage._with_retries("https://x", interrupted)
    assert len(calls) == 1


@pytest.mark.parametrize("durable", [True, False])
def test_atomic_write_shows_all_or_nothing(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.txt"
    with atomic_write(path, durable) as file:
        file.write(b"one")
        assert not path.exists()
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "two \ud800", durable)
    with pytest.raises(TypeError), atomic_write(path, durable) as file:
        file.write("two")
    assert path.read_bytes() == b"one"
    assert list(path.parent.iterdir()) == [path]


def test_a_durable_write_is_on_disk_before_it_takes_its_name_and_makes_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (events.append("rename"), replace(path, target)))
    write_text(tmp_path / "deep" / "a.txt", "one")
    assert events == ["sync", "rename", "sync"]


def test_a_write_that_is_not_durable_leaves_the_folder_alone_once_it_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who sees the new content may rename the folder at once; and a folder that is gone is not made again."""
    folder, replace = tmp_path / "folder", Path.replace
    folder.mkdir()

    def replace_and_rename(path: Path, target: Path) -> None:
        replace(path, target)
        folder.rename(tmp_path / "renamed")

    monkeypatch.setattr(Path, "replace", replace_and_rename)
    write_text(folder / "a.txt", "one", durable=False)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["renamed", "a.txt"]
    with pytest.raises(FileNotFoundError):
        write_text(folder / "a.txt", "one", durable=False)
    assert not folder.exists()


def test_leavings_of_one_name_go_and_no_others(tmp_path: Path) -> None:
    names = [".a.tar.1f.tmp", ".b.tar.22.tmp", ".a.json.3.tmp", "a.tar", ".a.tar.tmp"]
    for name in names:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path, "a.tar")
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])
    remove_unfinished(tmp_path, "*.tar")
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_a_folder_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "of a killed writer").touch()
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "file").write_text("one")
        assert not (tmp_path / "a").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "b"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_attack_1a_eviction_touches_only_its_own_files(prepared: Path, server: str, tmp_path: Path) -> None:
    """The cache's folder may be one that holds everything else that somebody has."""
    foreign = ["photos.tar", "a.tar", f"{'0' * 63}.tar", f"{'0' * 64}.tar.gz", f"{'G' * 64}.tar", f"x{'0' * 64}.tar"]
    for name in foreign:
        (tmp_path / name).write_bytes(bytes(100_000))
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f"{'1' * 64}.tar").mkdir()
    (tmp_path / f"{'2' * 64}.tar").symlink_to(tmp_path / "photos.tar")
    (tmp_path / f"{'3' * 64}.tar").write_bytes(bytes(100_000))
    os.utime(tmp_path / f"{'3' * 64}.tar", (1, 1))
    info = Manifest.load(prepared).splits["train"][0]
    path = ShardFiles(server, str(tmp_path), cache_gigabytes=(info.bytes + 1) / 1e9).path(
        info.name, info.bytes, info.sha256
    )
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*foreign, path.name, f"{'1' * 64}.tar", f"{'2' * 64}.tar"}


class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers with what the test says: a function of this handler."""

    answer: Callable[["Hostile"], object]
    sent = 0

    def do_GET(self) -> None:
        with contextlib.suppress(OSError):
            type(self).answer(self)

    def endless(self, piece: bytes = bytes(1 << 16), pause_s: float = 0.0, pieces: int = 1 << 12) -> None:
        self.send_response(200)
        self.end_headers()
        for _ in range(pieces):  # 256 MiB in all
            self.wfile.write(piece)
            type(self).sent += len(piece)
            time.sleep(pause_s)

    def elsewhere(self, place: str) -> None:
        self.send_response(302)
        self.send_header("Location", place)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hostile() -> Iterator[str]:
    Hostile.sent = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as instance:
        instance.daemon_threads = True
        threading.Thread(target=instance.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()


def test_attack_9a_no_more_is_written_than_was_promised(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_RETRY_SECONDS", (0.01,))
    Hostile.answer = Hostile.endless
    with pytest.raises(UserError, match="more than the 1000 bytes"):
        ShardFiles(hostile, str(tmp_path)).path("train-00000.tar", 1000, "0" * 64)
    assert Hostile.sent < 1 << 27
    assert not list(tmp_path.iterdir())


def test_attack_9a_a_shard_that_the_cache_cannot_hold_is_not_asked_for(hostile: str, tmp_path: Path) -> None:
    Hostile.answer = Hostile.endless
    with pytest.raises(UserError, match=r"281,474,976,710,655 bytes.*data\.cache_gigabytes"):
        ShardFiles(hostile, str(tmp_path)).path("train-00000.tar", (1 << 48) - 1, "0" * 64)
    assert Hostile.sent == 0


def test_attack_9b_a_manifest_has_an_end(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Hostile.answer = Hostile.endless
    monkeypatch.setattr(storage.read_bytes, "__defaults__", (1 << 20,))
    with pytest.raises(UserError, match=r"manifest\.json: cannot be read \(more than the 1,048,576 bytes"):
        Manifest.load(hostile)
    assert Hostile.sent < 1 << 27


def test_attack_9c_a_server_that_drips_is_given_up(
    hostile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then keeps every timeout of a socket from running out."""
    monkeypatch.setattr(storage, "_RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(storage, "PATIENCE_S", 0.2)
    Hostile.answer = partial(Hostile.endless, piece=b"x", pause_s=0.05, pieces=60)
    with pytest.raises(UserError, match=r"TimeoutError: only \d+ bytes in"):
        ShardFiles(hostile, str(tmp_path)).path("train-00000.tar", 1 << 20, "0" * 64)
    with pytest.raises(UserError, match=r"TimeoutError: only \d+ bytes in"):
        Manifest.load(hostile)


@pytest.mark.parametrize(
    "place",
    [
        "http://localhost:{port}/",  # another name for what only this machine reaches
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/",
        "https://[::1]/",
        "http://example.com/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
    ],
)
def test_attack_9d_redirects_lead_nowhere_inside(hostile: str, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    Hostile.answer = partial(Hostile.elsewhere, place=place.format(port=hostile.rpartition(":")[2]))
    with pytest.raises(UserError, match=r"redirects to|not allowed"):
        storage.read_bytes(hostile, "manifest.json")


def test_redirects_to_the_same_host_are_followed_a_few_times(prepared: Path, server: str, hostile: str) -> None:
    Hostile.answer = lambda handler: handler.elsewhere(f"{server}{handler.path}")
    assert Manifest.load(hostile) == Manifest.load(prepared)
    Hostile.answer = lambda handler: handler.elsewhere(handler.path)
    with pytest.raises(UserError, match="redirect"):
        storage.read_bytes(hostile, "manifest.json")


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o027, 0o640), (0o002, 0o664)])
def test_attack_13_the_umask_is_honoured_and_private_files_are_private(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "deep" / "a", "x")
        with atomic_write(tmp_path / "b", private=True) as file:
            file.write(b"x")
            (written,) = tmp_path.glob(".b.*")
            assert written.stat().st_mode & 0o777 == 0o600
        with atomic_folder(tmp_path / "c"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "deep" / "a").stat().st_mode & 0o777 == mode
    assert (tmp_path / "deep").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "c").stat().st_mode & 0o777 == 0o777 & ~umask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
