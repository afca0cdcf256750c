"""Whole copies of remote shards on a disk of this node, shared by all its processes.

In the folder stand, for each shard, ``NAME.tar`` (whole: it is renamed there from ``NAME.part``) and ``NAME.lock``, an
empty file. Whoever fetches a shard holds its lock, so each is fetched once a node; the lock of a process that dies is
free again. The copies used longest ago are deleted when room is needed. A reader that has such a copy open keeps
reading it, since its bytes go away with its last reader only.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from keye_train.data.storage import Storage

log = logging.getLogger(__name__)


class ShardCache:
    """The folder ``data.storage.cache_dir``, kept below ``cache_bytes``."""

    def __init__(self, storage: Storage) -> None:
        assert storage.settings.cache_dir is not None
        self._storage = storage
        self._folder = Path(storage.settings.cache_dir)
        self._limit_bytes = storage.settings.cache_bytes
        self._known: dict[str, tuple[str, int]] = {}  # URL -> name and bytes of its copy; asked once a process

    def open(self, url: str) -> int | None:
        """File descriptor of a whole copy, fetched first where there is none; None where the limit leaves no room.

        The caller closes it, and soon, because an open copy keeps its space after it was deleted.

        Raises:
            StorageError: the shard cannot be fetched.
            FileNotFoundError: there is no such shard.
        """
        name, size = self._identity(url)
        if size > self._limit_bytes:
            return None
        copy = self._folder / f"{name}.tar"
        while True:
            with suppress(FileNotFoundError):
                descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
                with suppress(FileNotFoundError):
                    os.utime(copy)  # used just now
                return descriptor
            if not self._fetch(url, name, size):
                return None
            # Another process may delete the copy again before we open it, hence the loop.

    def _identity(self, url: str) -> tuple[str, int]:
        """A shard that is written anew under the same URL is another one."""
        if url not in self._known:
            size, version = self._storage.stat(url)
            digest = hashlib.sha256(f"{url}\n{size}\n{version}".encode()).hexdigest()
            self._known[url] = digest[:40], size
        return self._known[url]

    def _fetch(self, url: str, name: str, size: int) -> bool:
        """Whether a whole copy stands there now; False where there is no room for it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        copy, part = self._folder / f"{name}.tar", self._folder / f"{name}.part"
        with _locked(self._folder / f"{name}.lock"):
            if copy.exists():
                return True  # another process was faster
            # One at a time makes room and takes it; the fetching itself goes on side by side.
            with _locked(self._folder / "room.lock"):
                part.unlink(missing_ok=True)
                if not self._make_room(size):
                    return False
                with part.open("wb") as file:
                    file.truncate(size)
            try:
                self._storage.download(url, part)
                part.replace(copy)
            finally:
                part.unlink(missing_ok=True)
        return True

    def _make_room(self, size: int) -> bool:
        """Delete what was used longest ago until ``size`` more bytes fit beside the copies and what is being fetched.

        False where they do not fit, because others are fetching.
        """
        copies: list[tuple[int, int, Path]] = []
        total = 0
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".part" and _is_free(path.with_suffix(".lock")):
                    path.unlink()  # its process died
                elif path.suffix in (".tar", ".part"):
                    status = path.stat()
                    total += status.st_size
                    if path.suffix == ".tar":
                        copies.append((status.st_mtime_ns, status.st_size, path))
        fetching = total - sum(freed for _, freed, _ in copies)
        if fetching + size > self._limit_bytes:
            return False  # deleting would not help
        for _, freed, path in sorted(copies):
            if total + size <= self._limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= freed
            log.info("%s made room in the cache of shards", path.name)
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file's lock among the processes and threads of this node; waits for it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_free(path: Path) -> bool:
    """Whether nobody holds a file's lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
