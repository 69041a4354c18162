"""Where prepared folders lie: local paths, or URLs read through a local cache. Files are written beside and renamed, and only
locally.

https is read with the standard library; every other scheme (s3, gs, hf, ...) is fsspec's, with the package that it asks for. A server
is not believed: no more is taken than was promised, no slower than `SLOWEST_BYTES_PER_S`, and not from where it points to inside of
this network.
"""

import contextlib
import errno
import hashlib
import ipaddress
import os
import re
import secrets
import shutil
import socket
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_chain, wait_fixed

from data_pipeline.core.errors import UserError
from data_pipeline.core.home import can_be_made, is_own, settle_home, temporary_home
from data_pipeline.core.outside import LARGEST_MANIFEST, read_at_most

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a write meets on a full disk."""
CACHE_GIGABYTES = 100.0
_TIMEOUT_S = 60.0  # without a byte
PATIENCE_S, SLOWEST_BYTES_PER_S = 120.0, 20_000
"""After the first, a download that has been slower than the second is given up."""
_CACHED = re.compile(r"[0-9a-f]{64}\.tar")
_PRIVATE = 0o600
_RETRY_SECONDS = (0.5, 2.0, 8.0, 20.0)  # waits between five attempts: outlasts a restarting proxy, not a missing bucket
_HOPELESS = (
    FileNotFoundError,
    ImportError,
    ValueError,
)  # the last two are fsspec's: a scheme's package is missing, or unknown
_CHUNK_BYTES = 1 << 20

Result = TypeVar("Result")


def is_url(location: str) -> bool:
    """Whether the location is a URL rather than a local path."""
    return "://" in location


def local_folder(location: str) -> Path:
    """The path of a folder that is written, or whose files are looked through. Raises UserError for a URL."""
    if is_url(location):
        raise UserError(
            f"{location} is a URL, expected a local folder: outputs are written locally, copy the folder afterwards; and "
            "a folder is looked through where it is local"
        )
    return Path(location)


def read_bytes(folder: str, name: str, most: int = LARGEST_MANIFEST) -> bytes:
    """Contents of a small file of the folder. Raises FileNotFoundError when there is none; UserError, if it has more than `most` bytes."""
    place = f"{folder}/{name}"

    def read() -> bytes:
        with _open_url(place) if is_url(folder) else open_file(Path(folder) / name) as file:
            try:
                return read_at_most(_Patient(file) if is_url(folder) else file, most)  # type: ignore[arg-type]
            except (ValueError, MemoryError) as error:
                raise UserError(
                    f"{place}: cannot be read ({error or 'out of memory'}); it is not what it should be"
                ) from None

    return _with_retries(place, read) if is_url(folder) else read()


def open_file(path: Path, buffering: int = -1) -> Any:
    """Open a local file for reading. Raises OSError for anything else of that name: a pipe would wait for its writer."""
    file = open(path, "rb", buffering, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 (returned)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "Not a file", str(path))
    return file


class ShardFiles:
    """Shard files of a folder as local paths; those of a URL are kept in a cache of bounded size, named by their SHA-256.

    Args:
        folder: local path or URL.
        cache_dir: folder of the cache (None: `textldm/shards` in the user's cache folder); several processes may share it.
        cache_gigabytes: when a download exceeds this, files not used for longest are removed. An open shard stays readable.
    """

    def __init__(self, folder: str, cache_dir: str | None = None, cache_gigabytes: float = CACHE_GIGABYTES):
        self._folder = folder
        self._cache = Path(cache_dir) if cache_dir else user_cache() / "shards"
        self._cache_bytes = int(cache_gigabytes * 1e9)

    def path(self, name: str, num_bytes: int, sha256: str) -> Path:
        """Local path of a shard, downloaded first if need be. Raises UserError if it cannot be had."""
        if not is_url(self._folder):
            return Path(self._folder) / name
        if num_bytes > self._cache_bytes:
            raise UserError(
                f"{self._folder}/{name} has {num_bytes:,} bytes by its manifest, and the cache may hold {self._cache_bytes:,}: raise"
                " data.cache_gigabytes"
            )
        path = self._cache / f"{sha256}.tar"
        try:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # recently used, but not changed
        except FileNotFoundError:
            url = f"{self._folder}/{name}"
            try:
                _with_retries(url, lambda: _download(url, path, num_bytes, sha256))
            except FileNotFoundError:
                raise UserError(f"{url} does not exist, but the manifest names it: upload the folder again") from None
            self._evict(path)
        return path

    def is_evicted(self, path: Path) -> bool:
        """Whether a file of the cache has been removed again."""
        return is_url(self._folder) and not path.exists()

    def discard(self, path: Path) -> bool:
        """Forget a cached file that turned out to be damaged, so that the next attempt downloads it again; False if it is no copy."""
        if is_url(self._folder):
            path.unlink(missing_ok=True)
        return is_url(self._folder)

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used files until the cache is within its limit; `newest` stays, and so does what has another
        name than a download gets: the folder may be anybody's.
        """
        files = []
        for path in self._cache.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process may evict at the same time
                status = path.lstat()
                if _CACHED.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                    files.append((status.st_atime, status.st_size, path))
        excess = sum(size for _, size, _ in files) - self._cache_bytes
        for _, size, path in sorted(files):
            if excess > 0 and path != newest:
                path.unlink(missing_ok=True)
                excess -= size


def user_cache() -> Path:
    """This project's folder below the user's cache folder; below a temporary one if there is no home to write to, or it is another's."""
    settle_home()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "textldm"
    return cache if can_be_made(cache) and is_own(cache) else temporary_home() / ".cache" / "textldm"


def _open_private(name: str, flags: int) -> int:
    return os.open(name, flags, _PRIVATE)


@contextmanager
def atomic_write(path: Path, durable: bool = True, private: bool = False) -> Iterator[IO[bytes]]:
    """Open a file beside `path` that takes its name once all is written: a reader sees the old content or the new one.

    Durable: a power cut undoes neither content nor name, and the folder is made where there is none. Else the folder must be
    there, and is not touched any more once the new content is seen: who sees it may rename the folder. Private: readable for this
    user alone, from the first byte on; else for whom the umask says.
    """
    if durable:
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb", opener=_open_private if private else None) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a small text file by `atomic_write`."""
    with atomic_write(path, durable) as file:
        file.write(text.encode())


def remove_unfinished(folder: Path, names: str) -> None:
    """Delete what killed processes left of files that nobody writes now; `names` is a glob pattern of theirs."""
    for leftover in folder.glob(f".{names}.*.tmp"):
        leftover.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside `path` that takes its name once all is written. A killed writer's is replaced."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' content: without it a power cut may forget a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _download(url: str, path: Path, num_bytes: int, sha256: str) -> None:
    """Copy a file into the cache; OSError if it is not the promised one, which a new attempt may mend."""
    digest, count = hashlib.sha256(), 0
    with _open_url(url) as opened, atomic_write(path) as file:
        source = _Patient(opened)
        while chunk := source.read(min(_CHUNK_BYTES, num_bytes + 1 - count)):
            count += len(chunk)
            if count > num_bytes:
                raise OSError(f"it has more than the {num_bytes} bytes that the manifest says")
            file.write(chunk)
            digest.update(chunk)
        if count != num_bytes:
            raise OSError(f"got {count} bytes, the manifest says {num_bytes}")
        if digest.hexdigest() != sha256:
            raise OSError(f"SHA-256 is {digest.hexdigest()[:16]}..., the manifest says {sha256[:16]}...")


class _Patient:
    """A remote file that may be slow, but not for ever. Raises: TimeoutError."""

    def __init__(self, file: Any) -> None:
        # Of http, what has come: `read` would wait for all of it, however slowly it comes.
        self._read = getattr(file, "read1", file.read)
        self._began, self._count = time.monotonic(), 0

    def read(self, most: int) -> bytes:
        """Some bytes, none at the end."""
        piece = self._read(most)
        self._count += len(piece)
        seconds = time.monotonic() - self._began
        if seconds > PATIENCE_S and self._count < SLOWEST_BYTES_PER_S * seconds:
            raise TimeoutError(f"only {self._count} bytes in {seconds:.0f} s")
        return piece


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to the same host, and to others over https that are not of this machine's own network: a server must not use us to ask
    what only we can reach.
    """

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        kept = after.scheme == before.scheme or after.scheme == "https"
        if not kept or (
            after.hostname != before.hostname and (after.scheme != "https" or _is_inside(after.hostname or ""))
        ):
            raise ValueError(f"it redirects to {newurl}, where only https to a public address is followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_inside(host: str) -> bool:
    """Whether a host's name leads into this machine's own network; of one that is unknown here, a proxy knows."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return any(not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)


def _open_url(url: str) -> Any:
    if url.startswith(("http://", "https://")):
        try:
            return urllib.request.build_opener(_Redirects).open(url, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                raise FileNotFoundError(url) from None
            raise
    import fsspec

    return fsspec.open(url, "rb").open()


def _with_retries(url: str, action: Callable[[], Result]) -> Result:
    """Call the action until it succeeds, waiting longer each time. What cannot get better with time is not tried again."""
    attempts = len(_RETRY_SECONDS) + 1
    retrying = Retrying(
        stop=stop_after_attempt(attempts),
        wait=wait_chain(*map(wait_fixed, _RETRY_SECONDS)),
        retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _HOPELESS)),
        reraise=True,
    )
    try:
        return retrying(action)
    except (FileNotFoundError, UserError):
        raise
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be read ({error}); install that package, or use another URL") from None
    except Exception as error:  # every scheme has network errors of its own
        raise UserError(
            f"{url}: cannot be read after {attempts} attempts ({type(error).__name__}: {error}); check the address, the "
            "network and the credentials"
        ) from None
