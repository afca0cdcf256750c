"""Files on this machine and behind URLs, through one set of functions.

Local paths take the direct way (open, pread). URLs go through fsspec, and only where ``data.storage.allow_network``
says so. Every read of a URL is tried again after faults that may pass, with exponential back-off and full jitter. A
fault that stays is a ``StorageError`` and stops the run: samples are never left out because a storage failed.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import fsspec

from keye_train.settings import SettingsError, StorageSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

LONGEST_WAIT_S = 60.0
STRETCHES = 8  # of work for each connection
PATIENCE = 4
"""``Storage.map_quick`` takes threads once more than so many local items had to wait, and more than one of so many."""
DOWNLOAD_BLOCK_BYTES = 16 * 2**20

_THREAD = threading.local()
"""``busy`` is set in the threads of a storage."""

# What no second attempt mends. All else (timeouts, resets, 5xx) comes as a kind that depends on the storage.
_PERMANENT = (FileNotFoundError, PermissionError, NotImplementedError, TypeError, AttributeError, ImportError)


class StorageError(OSError):
    """A shard or index that should be there cannot be read. Stops the run; nothing is skipped for it."""


def is_url(path: str | Path) -> bool:
    """Whether a path goes through fsspec."""
    return "://" in str(path)


class Storage:
    """Reads and writes whole files and byte ranges. Make one for each process; only its settings travel."""

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()
        self._systems: dict[str, Any] = {}
        self._threads: ThreadPoolExecutor | None = None

    def __reduce__(self) -> tuple[type[Storage], tuple[StorageSettings]]:
        return Storage, (self.settings,)  # connections stay in the process that opened them

    def expand(self, pattern: str) -> list[str]:
        """Files that a path or URL with ``*``, ``?`` and ``[...]`` stands for, in order; without these, itself."""
        if not glob.has_magic(pattern) or (pattern.startswith("http") and is_url(pattern) and "*" not in pattern):
            return [pattern]  # ? begins the query of a web address
        if not is_url(pattern):
            return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute ones)
        system = self._system(pattern)
        found = self._try(f"list {pattern}", lambda: system.glob(pattern))
        return sorted(system.unstrip_protocol(name) for name in found)

    def size(self, path: str | Path) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the storage does not answer, or not how long the file is.
        """
        if not is_url(path):
            return os.stat(path).st_size  # noqa: PTH116 (a start looks at 60,000 files; a Path takes longer to make)
        return self.stat(path)[0]

    def stat(self, path: str | Path) -> tuple[int, str]:
        """Bytes of a file, and what changes when it is written anew (ETag or time of change; may be empty)."""
        if not is_url(path):
            status = os.stat(path)  # noqa: PTH116 (as in ``size``)
            return status.st_size, str(status.st_mtime_ns)
        info = self._try(f"look up {path}", lambda: self._system(path).info(str(path)))
        if info.get("size") is None:
            raise StorageError(f"the storage does not tell the size of {path}; copy it to a disk or an object store")
        version = next((str(info[name]) for name in ("ETag", "etag", "LastModified", "mtime") if info.get(name)), "")
        return int(info["size"]), version

    def modified(self, path: str | Path) -> float | None:
        """When a file was written, in seconds since 1970; None where the storage does not tell."""
        if not is_url(path):
            return Path(path).stat().st_mtime
        info = self._try(f"look up {path}", lambda: self._system(path).info(str(path)))
        moment = next((info[name] for name in ("LastModified", "updated", "mtime") if info.get(name)), None)
        if isinstance(moment, datetime):
            return moment.timestamp()
        return float(moment) if isinstance(moment, int | float) else None

    def exists(self, path: str | Path) -> bool:
        """Whether there is such a file; errors as for ``size``."""
        if not is_url(path):
            return os.path.isfile(path)  # noqa: PTH113 (as in ``size``)
        try:
            self._try(f"look up {path}", lambda: self._system(path).info(str(path)))
        except FileNotFoundError:
            return False
        return True

    def read(self, path: str | Path) -> bytes:
        """A whole file; errors as for ``size``."""
        if not is_url(path):
            return Path(path).read_bytes()
        return self._try(f"read {path}", lambda: self._system(path).cat_file(str(path)))

    def read_ranges(self, path: str | Path, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Byte ranges [start, end) of a remote file, up to ``connections`` of them at once.

        Raises:
            StorageError: the storage does not answer, or the file is gone or ends before a range.
        """

        def fetch(bounds: tuple[int, int]) -> bytes:
            start, end = bounds
            what = f"read bytes {start} to {end} of {path}"
            data: bytes = self._try(what, lambda: self._exactly(path, start, end))
            return data

        try:
            return self.map(fetch, ranges)
        except FileNotFoundError as error:
            raise StorageError(f"{path} is not there any more; bring it back and resume the run") from error

    def map(self, function: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
        """Apply a function that waits for the storage, to up to ``connections`` items at once; results in order.

        What the function itself hands to ``map`` is done one by one: all threads may be busy with such functions, and
        none would be left for what they wait for.
        """
        if len(items) < 2 or self.settings.connections < 2 or getattr(_THREAD, "busy", False):
            return [function(item) for item in items]
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                self.settings.connections,
                thread_name_prefix="storage",
                initializer=setattr,
                initargs=(_THREAD, "busy", True),
            )
        # In stretches where there are thousands: handing over an item takes longer than a look at a local file.
        step = max(1, len(items) // (STRETCHES * self.settings.connections))
        stretches = [items[first : first + step] for first in range(0, len(items), step)]
        done = self._threads.map(lambda stretch: [function(item) for item in stretch], stretches)
        return [result for results in done for result in results]

    def is_remote(self, shard: str) -> bool:
        """Whether a shard or its index is behind a URL."""
        return is_url(shard) or is_url(self.settings.index_dir or "")

    def map_quick(self, function: Callable[[Any], T], items: Sequence[Any], remote: bool = False) -> list[T]:
        """As ``map``, for what takes microseconds where the files are in memory: threads would double that.

        So items are done one by one as long as they need not wait for a disk. Whether they do is counted, not timed: a
        thread that waits gives up its processor. Where some are ``remote``, all are done as ``map`` does: each has to
        wait.
        """
        if remote:
            return self.map(function, items)
        done: list[T] = []
        waited, given_up = 0, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        for item in items:
            done.append(function(item))
            before, given_up = given_up, resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
            waited += given_up > before
            if waited > PATIENCE and PATIENCE * waited > len(done):
                return done + self.map(function, items[len(done) :])
        return done

    def write(self, path: str | Path, data: bytes) -> None:
        """Write a file that appears whole or not at all.

        A local one is renamed into its place. Object stores show an object when all of it has arrived.
        """
        if is_url(path):
            self._try(f"write {path}", lambda: self._system(path).pipe_file(str(path), data))
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)

    def download(self, path: str, target: Path) -> None:
        """Copy a remote file to a local one, several blocks at once.

        Raises:
            FileNotFoundError, StorageError: as for ``read_ranges``.
        """
        size = self.size(path)
        with target.open("wb") as file:
            file.truncate(size)  # the space is seen to be taken from the start
            step = DOWNLOAD_BLOCK_BYTES * self.settings.connections
            for start in range(0, size, step):
                edges = [*range(start, min(start + step, size), DOWNLOAD_BLOCK_BYTES), min(start + step, size)]
                for data in self.read_ranges(path, list(pairwise(edges))):
                    file.write(data)

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        """A local file with the bytes of a path or URL; of a URL, one (under TMPDIR) that goes away again."""
        if not is_url(path):
            yield Path(path)
            return
        with TemporaryDirectory(prefix="keye-shard-") as folder:
            copy = Path(folder) / "shard.tar"
            self.download(path, copy)
            yield copy

    def close(self) -> None:
        """End the threads."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
            self._threads = None

    def _exactly(self, path: str | Path, start: int, end: int) -> bytes:
        data: bytes = self._system(path).cat_file(str(path), start=start, end=end)
        if len(data) != end - start:
            raise OSError(f"got {len(data)} of {end - start} bytes")
        return data

    def _system(self, path: str | Path) -> Any:
        protocol = str(path).partition("://")[0]
        if protocol not in self._systems:
            self._systems[protocol] = _open_system(str(path), protocol, self.settings.allow_network)
        return self._systems[protocol]

    def _try(self, what: str, action: Callable[[], T]) -> T:
        """Do something, several times where it fails in a way that may pass.

        Raises:
            FileNotFoundError: the file is not there.
            StorageError: any other failure that stayed.
        """
        for attempt in range(1, self.settings.attempts + 1):
            try:
                return action()
            except SettingsError:
                raise
            except FileNotFoundError as error:
                raise FileNotFoundError(f"cannot {what}: it is not there") from error
            except Exception as error:  # each storage has kinds of its own for a fault of the network
                if isinstance(error, _PERMANENT) or attempt == self.settings.attempts:
                    tried = f" after {attempt} attempts (data.storage.attempts)" if attempt > 1 else ""
                    raise StorageError(f"cannot {what}{tried}: {type(error).__name__}: {error}") from error
                wait = random.uniform(0, min(LONGEST_WAIT_S, self.settings.backoff_s * 2 ** (attempt - 1)))
                log.warning("cannot %s (%s: %s); again in %.1f s", what, type(error).__name__, error, wait)
                time.sleep(wait)
        raise AssertionError("attempts is at least 1")


def _open_system(path: str, protocol: str, allow_network: bool) -> Any:
    """File system of a URL.

    Raises:
        SettingsError: not allowed, unknown, or its package is not installed.
    """
    if "::" in path:
        raise SettingsError(f"{path}: chained URLs are not read; give the URL of the shard itself")
    if not allow_network and protocol not in ("file", "local"):
        raise SettingsError(
            f"{path} is behind a network, which this recipe does not use; set data.storage.allow_network=true "
            "(keye-data: --allow-network), or give a local path"
        )
    try:
        # Listings that were remembered would hide what changed meanwhile.
        return fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        raise SettingsError(f"{path}: reading {protocol}:// needs a package that is not installed: {error}") from error
    except ValueError as error:
        raise SettingsError(f"{path}: no file system is known for {protocol}://") from error
