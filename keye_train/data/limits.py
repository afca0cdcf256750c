"""What one sample may cost its reader process: time and memory, enforced where Python cannot look.

A decoder is C code that may spin, wait, swallow all memory or crash. Each of these ends at most the reader process; the
training process starts another one and the sample goes to the ledger.

===========================  ==================================================================================
CPU time                     a kernel timer (ITIMER_PROF) kills the process
time by the clock            the training process looks at the progress file and kills the process
memory                       the kernel refuses it (RLIMIT_DATA); a decoder that reports this loses only the sample
a crash                      the process is gone; the progress file still names the sample
===========================  ==================================================================================

CPU time comes first, so that a busy machine does not change what is skipped.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from keye_train.data.shared_file import SharedFile
from keye_train.sample import SampleError

CLOCK_FACTOR = 5.0
"""Time by the clock that a sample may take, in its CPU time: decoders share cores, and may wait for each other."""
OF_THE_SAMPLE = frozenset(
    (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGTRAP, signal.SIGPROF)
)
"""Signals by which a sample ends its reader. SIGKILL is none: the machine ran out of memory, or somebody sent it."""

Watch = Callable[[int], AbstractContextManager[None]]
"""``with watch(number):`` around the work on the sample ``number`` of a task."""


def unwatched(_: int) -> AbstractContextManager[None]:
    """In the main process nothing can be limited: it would be the one to die."""
    return nullcontext()


_PROGRESS = struct.Struct("<qd")  # number of the sample in work, -1 between two; when it began
_STATM = "/proc/self/statm"
_STATM_DATA = 5  # field: private writable memory in pages, what RLIMIT_DATA counts


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of one sample: ``data.decode_seconds`` and ``data.decode_bytes``."""

    seconds: float  # CPU time
    memory_bytes: int
    seconds_setting: str = "data.decode_seconds"  # for messages
    bytes_setting: str = "data.decode_bytes"

    @property
    def clock_s(self) -> float:
        """Seconds by the clock."""
        return CLOCK_FACTOR * self.seconds

    def died_of(self, number: int) -> str:
        """Reason for the ledger where a signal of ``OF_THE_SAMPLE`` ended the reader."""
        if number == signal.SIGPROF:
            return f"decoding took longer than {self.seconds_setting}={self.seconds:g} s of CPU time"
        return f"decoding it ended the reader process by {signal.Signals(number).name}"

    def too_slow(self) -> str:
        """Reason for the ledger where the clock ran out."""
        return (
            f"decoding took longer than {self.clock_s:g} s by the clock, {CLOCK_FACTOR:g} times "
            f"{self.seconds_setting}={self.seconds:g}"
        )

    def too_large(self) -> str:
        """Reason for the ledger where memory was refused."""
        return f"decoding takes more than {self.bytes_setting}={self.memory_bytes} of memory"


class Progress(SharedFile):
    """Which sample of its task a reader process works on."""

    def begin(self, number: int) -> None:
        """Work on a sample begins."""
        os.pwrite(self.file.fileno(), _PROGRESS.pack(number, time.monotonic()), 0)

    def end(self) -> None:
        """Work on the sample has ended."""
        self.begin(-1)

    def read(self) -> tuple[int, float]:
        """Number of the sample, -1 where none is in work, and the seconds since it began."""
        number, began = _PROGRESS.unpack(os.pread(self.file.fileno(), _PROGRESS.size, 0) or _PROGRESS.pack(-1, 0.0))
        return number, time.monotonic() - began


class DecodeWatch:
    """Holds the samples of this process to the limits. One for each reader process."""

    def __init__(self, limits: DecodeLimits, progress: Progress) -> None:
        self._limits, self._progress = limits, progress
        self._lifted = resource.getrlimit(resource.RLIMIT_DATA)
        self._statm = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC) if Path(_STATM).exists() else None

    @contextmanager
    def __call__(self, number: int) -> Iterator[None]:
        """Decode the sample ``number`` of the task.

        Raises:
            SampleError: memory was refused.
        """
        self._progress.begin(number)
        signal.setitimer(signal.ITIMER_PROF, self._limits.seconds)
        self._limit_memory()
        try:
            yield
        except MemoryError as error:
            raise SampleError(self._limits.too_large()) from error
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise SampleError(self._limits.too_large()) from error
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, self._lifted)
            signal.setitimer(signal.ITIMER_PROF, 0.0)
            self._progress.end()

    def _limit_memory(self) -> None:
        if self._statm is None:
            return  # not Linux; data.decode_bytes says so
        used = int(os.pread(self._statm, 256, 0).split()[_STATM_DATA]) * resource.getpagesize()
        soft, hard = self._lifted
        limit = used + self._limits.memory_bytes
        known = [value for value in (limit, soft, hard) if value != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_DATA, (min(known), hard))
