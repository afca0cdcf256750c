"""The folder of a merge: written aside, resumed where it was interrupted, renamed when it is whole."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keye_train.merging.compatibility import MergeError
from keye_train.runs import MANIFEST, file_sha256, read_json, sync, write_json_atomic
from keye_train.settings import SettingsError

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished"


class DiskFull(SettingsError):
    """There is no room for the result."""


class PartialOutput:
    """The hidden folder beside ``out`` in which a merge is written.

    Its manifest.json names the files that are whole, so a merge that was killed goes on behind them.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Args:
        folder: exists and is locked by this process.
        identity: request and inputs; files of a merge with another identity are removed.
        """
        self.folder = folder
        self._identity = dict(identity)
        self.files: dict[str, dict[str, Any]] = {}
        """Whole files: name -> bytes and SHA-256."""
        for file, entry in self._left_behind().items():
            path = folder / file
            if path.exists() and path.stat().st_size == entry["bytes"] and file_sha256(path) == entry["sha256"]:
                self.files[file] = entry
                logger.info("%s is whole: kept", path)
        for path in folder.iterdir():
            if path.name not in self.files:
                path.unlink()
        self._write()

    def add(self, name: str, sha256: str) -> None:
        """Note that a file is whole and on the disk."""
        self.files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": sha256}
        self._write()

    def _write(self) -> None:
        write_json_atomic(self.folder / MANIFEST, {"status": UNFINISHED, "files": self.files} | self._identity)

    def _left_behind(self) -> dict[str, dict[str, Any]]:
        path = self.folder / MANIFEST
        manifest = read_json(path) if path.exists() else {}
        if manifest.get("status") != UNFINISHED or any(manifest.get(k) != v for k, v in self._identity.items()):
            return {}
        return dict(manifest["files"])


@contextmanager
def partial_output(out: Path, identity: Mapping[str, Any]) -> Iterator[PartialOutput]:
    """A folder beside ``out`` that becomes ``out`` when the block ends well.

    Where it does not, whole files stay for the next run of the same merge; where the models cannot be merged, nothing
    does. The kernel drops the lock of a dead process, so a folder that is locked belongs to a merge that still runs.

    Raises:
        SettingsError: another merge is writing there.
        DiskFull: the disk has no room.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.partial")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    files: dict[str, Any] = {}
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"out={out} is being written by another merge: wait for it or end it") from error
        try:
            partial = PartialOutput(folder, identity)
            files = partial.files
            yield partial
            for path in folder.iterdir():
                sync(path)
            sync(folder)
            folder.rename(out)
            sync(out.parent)
        except BaseException as error:
            if isinstance(error, MergeError) or not files:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise DiskFull(_no_room(out, files)) from error
            raise
    finally:
        os.close(lock)


def check_room(out: Path, n_bytes: int, files: Mapping[str, Any]) -> None:
    """Raise DiskFull where the disk of ``out`` has fewer than ``n_bytes`` left."""
    free = shutil.disk_usage(out.parent).free
    if free < n_bytes:
        raise DiskFull(f"{_no_room(out, files)} (to write: {n_bytes:,} bytes, free: {free:,})")


def _no_room(out: Path, files: Mapping[str, Any]) -> str:
    kept = f"; {len(files)} finished file(s) are kept in .{out.name}.partial beside it" if files else ""
    return f"out={out}: no space left on its disk: free some and run the same command again, or choose another{kept}"
