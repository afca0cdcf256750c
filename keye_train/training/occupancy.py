"""One launch at a time in a run folder, also after a launcher was killed and left its ranks behind.

Every rank holds a shared lock on ``RUN/.lock`` as long as it lives; the kernel takes it back however the process ends.
A launch begins by asking for the lock alone: it then waits for the ranks of an earlier one, which end by themselves
once they notice that their launcher is gone (:meth:`keye_train.training.guards.StopRequest.as_flags`).

A launch that fails before it wrote anything, on a wrong parent or a shard without an index, takes the folder that it
made away again.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

from keye_train.settings import SettingsError
from keye_train.training.distributed import World

logger = logging.getLogger(__name__)

LOCK = ".lock"
MADE = b"made with the folder\n"
"""In the lock of a folder that was not there before."""
PATIENCE_S = 120.0
"""How long a launch waits for an earlier one to end: a step and a checkpoint."""


class RunLock:
    """Holds a run folder for this launch, until the process ends or :meth:`release`.

    POSIX record locks: they work on NFS and Lustre too, and a forked child does not inherit them. Other descriptors of
    the file must not be closed in this process, which would drop the lock: nothing else opens it.

    Collective: every rank must reach this.

    Raises:
        SettingsError: another launch holds the folder, or its file system has no locks.
        RuntimeError: so it is on another rank.
    """

    def __init__(self, run_dir: Path, world: World, patience_s: float = PATIENCE_S) -> None:
        self._path = run_dir / LOCK
        self._file: BinaryIO | None = None
        try:
            alone = None
            if world.is_main:  # it steps down from exclusive to shared without a gap, and before the others ask
                alone = self._take(fcntl.LOCK_EX, patience_s) or self._take(fcntl.LOCK_SH, patience_s)
            world.require_all(alone, f"waiting for {run_dir}")
            others = None if world.is_main else self._take(fcntl.LOCK_SH, patience_s)
            world.require_all(others, f"sharing {self._path}")
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let go, where a process goes on after its run; the last one takes a folder away in which nothing happened."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # held by others: one of them is the last
            fcntl.lockf(self._file, fcntl.LOCK_UN)
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove_unused(self._file)
        self._file.close()
        self._file = None

    def _remove_unused(self, file: BinaryIO) -> None:
        """Remove the folder if this launch made it and it holds the lock alone. Nobody else holds that."""
        file.seek(0)
        folder = self._path.parent
        if file.read() == MADE and self._is_current(file) and list(folder.iterdir()) == [self._path]:
            self._path.unlink()
            folder.rmdir()

    def _is_current(self, file: BinaryIO) -> bool:
        """Whether the open file is the one that stands there by now."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def _take(self, kind: int, patience_s: float) -> SettingsError | None:
        """Why the lock cannot be had; None where it is held now."""
        try:
            while True:
                file = self._file = self._file or self._open()
                if not self._wait(file, kind, patience_s):
                    break
                if self._is_current(file):
                    return None
                file.close()  # a launch that failed took the folder away while this one waited
                self._file = None
        except OSError as error:
            return SettingsError(
                f"run_dir={self._path.parent}: {self._path.name} cannot be locked ({error}). Runs need a file system "
                "with POSIX locks that this user may write to (Lustre: mounted with -o flock): choose another run_dir"
            )
        return SettingsError(
            f"run_dir={self._path.parent} is in use by another launch: wait for it to end, or choose another run_dir"
        )

    def _open(self) -> BinaryIO:
        new = not self._path.parent.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+b")
        if new:
            file.write(MADE)
            file.flush()
        return file

    def _wait(self, file: BinaryIO, kind: int, patience_s: float) -> bool:
        deadline, said = time.monotonic() + patience_s, False
        while True:
            try:
                fcntl.lockf(file, kind | fcntl.LOCK_NB)
                return True
            except (BlockingIOError, PermissionError):
                if time.monotonic() > deadline:
                    return False
            if not said:
                logger.warning("%s: an earlier launch is still running there; waiting for it to end", self._path)
                said = True
            time.sleep(0.05)
