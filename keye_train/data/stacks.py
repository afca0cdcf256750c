"""Where a reader process stands: on a signal its Python stacks go into a nameless file that the trainer can read.

The handler is C code that runs whatever the process is busy with, a decoder or a read that does not come back.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from typing import Any, cast

from keye_train.data.shared_file import SharedFile

STACK_SIGNAL = signal.SIGUSR2
WRITE_SECONDS = 2.0
"""How long the answer of a process is waited for."""
POLL_SECONDS = 0.02


class StackFile(SharedFile):
    """The file; both processes hold it."""

    def __init__(self, descriptor: int | None = None) -> None:
        super().__init__(descriptor)
        self._seen = 0

    def answer_signals(self) -> None:
        """In the reader: from now on each ``STACK_SIGNAL`` writes the stacks of all threads into the file."""
        faulthandler.register(STACK_SIGNAL, file=cast(Any, self.file), all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {STACK_SIGNAL})

    def ask(self, pid: int) -> str:
        """In the trainer: the stacks of the reader ``pid``; says so where it does not answer."""
        try:
            os.kill(pid, STACK_SIGNAL)
        except ProcessLookupError:
            return "the process is gone\n"
        deadline, size = time.monotonic() + WRITE_SECONDS, -1
        while time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            before, size = size, os.fstat(self.file.fileno()).st_size
            if size == before > self._seen:  # it has stopped growing
                break
        text = os.pread(self.file.fileno(), max(size - self._seen, 0), self._seen).decode(errors="replace")
        self._seen = max(size, self._seen)
        return text or f"no answer within {WRITE_SECONDS:g} s\n"
