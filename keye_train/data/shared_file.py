"""A file without a name that a process and the one it starts both hold: what one writes, the other reads."""

from __future__ import annotations

import os
import tempfile
from multiprocessing.reduction import DupFd
from typing import Any, Self


class SharedFile:
    """Handed to a process while it is started, it is the same file there; the disk frees it with its last holder."""

    def __init__(self, descriptor: int | None = None) -> None:
        """Args:
        descriptor: of an open file, which now belongs to this object; None: a new, empty file.
        """
        if descriptor is None:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
            os.set_inheritable(descriptor, False)
        self.file = os.fdopen(descriptor, "r+b", buffering=0)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._attach, (DupFd(self.file.fileno()),)

    @classmethod
    def _attach(cls, duplicate: Any) -> Self:
        return cls(duplicate.detach())

    def close(self) -> None:
        """Close this side of the file."""
        self.file.close()
