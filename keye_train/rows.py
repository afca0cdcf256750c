"""JSON-lines files that a run appends to, on a disk that may be full for a while.

What the disk does not take waits in memory and is tried again at the next row: a line is never cut in the middle, and
none is lost as long as the process lives.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

MAX_WAITING_BYTES = 64 << 20
"""Rows that may be lost are, beyond this many bytes in memory."""


class RowFile:
    """Appends rows to a file; a failing disk is a warning, once for each outage. Safe for several threads.

    Args:
        path: of the file.
        must_keep: whether every row has to wait for the disk, however many they are.
    """

    def __init__(self, path: Path, must_keep: bool = False) -> None:
        self.path = path
        self._mode = "ab"
        self._must_keep = must_keep
        self._file: BinaryIO | None = None
        self._waiting = bytearray()
        self._fault: OSError | None = None
        self._dropped = 0
        self._lock = threading.Lock()
        self._flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, as soon as the disk takes it."""
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._lock:
            if self._must_keep or len(self._waiting) + len(line) <= MAX_WAITING_BYTES:
                self._waiting += line
            else:
                self._dropped += 1
            self._flush()

    def turn_to(self, path: Path) -> None:
        """Go on in another file, from its start. Rows that the disk did not take are dropped."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
            self._waiting.clear()
            self.path, self._mode = path, "wb"
            self._flush()

    def settle(self) -> None:
        """Have all rows up to now on the disk, safe from the end of the machine.

        Raises:
            OSError: the disk is full, or fails.
        """
        with self._lock:
            self._flush()
            if self._fault is not None:
                raise OSError(self._fault.errno, f"{self.path}: rows wait for the disk: {self._fault.strerror}")
            if self._file is not None:
                os.fsync(self._file.fileno())

    def close(self) -> OSError | None:
        """Close the file; why rows of it are lost, None where none is."""
        with self._lock:
            self._flush()
            if self._file is not None:
                self._file.close()
                self._file = None
            lost = self._waiting.count(b"\n") + self._dropped
            if not lost:
                return None
            logger.error("%s: %d rows are lost, the disk did not take them", self.path, lost)
            return OSError(self._fault.errno if self._fault else None, f"{self.path}: {lost} rows could not be written")

    def _flush(self) -> None:
        """Write what waits, as far as the disk takes it. Unbuffered, so that what is left is known to the byte."""
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open(self._mode, buffering=0)  # type: ignore[assignment]
                self._mode = "ab"
            while self._waiting:
                assert self._file is not None
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if self._fault is None:
                logger.warning(
                    "%s CANNOT BE WRITTEN (%s): the disk is full or fails. Training goes on, its rows wait in memory "
                    "and are written as soon as there is room. Make room.",
                    self.path,
                    error,
                )
            self._fault = error
            return
        if self._fault is not None:
            logger.warning("%s is written again", self.path)
        self._fault = None
