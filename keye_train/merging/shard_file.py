"""A safetensors file written from its first byte to its last, past the page cache, and hashed on the way.

Copying results into the page cache costs a merge more processor time than its arithmetic, and throws out what others
have there. So values are gathered in aligned memory and written with O_DIRECT by threads of the file; where a file
system has no O_DIRECT, by plain writes that are flushed as they go.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import queue
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from keye_train.merging.buffers import ALIGNMENT
from keye_train.merging.places import DTYPE_NAMES

CHUNK_BYTES = 8 << 20
"""Written at a time: long enough for the disk to be at its full speed."""

CHUNKS, WRITERS = 4, 2
"""Pieces of memory, and threads that write them: one is filled while the others are on their way to the disk."""

FLUSH_BYTES = 128 << 20
"""Without O_DIRECT: written before the disk is told to begin; the rest of its cache is then never large."""


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return self.elements * self.dtype.itemsize


class ShardFile:
    """One safetensors file; use as a context manager, in one thread.

    Its whole size is reserved at once, so a full disk shows before the work is done.

    Args:
        file: written anew.
        tensors: of the file; ``write`` takes their values in this order.

    Raises:
        OSError: the disk is full, or fails.
    """

    def __init__(self, file: Path, tensors: Sequence[PlannedTensor]) -> None:
        head = _head(tensors)
        self.file = file
        self._size = len(head) + sum(tensor.n_bytes for tensor in tensors)
        self._digest = hashlib.sha256()
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, self._size)
            self._direct = _set_direct(self._descriptor, True)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._unflushed = 0
        self._given = 0  # bytes of the file that ``write`` was given
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(CHUNKS):
            self._free.put(torch.frombuffer(mmap.mmap(-1, CHUNK_BYTES), dtype=torch.uint8))
        self._chunk, self._filled = self._free.get(), 0
        self._writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._writes: deque[Future[None]] = deque()
        self._append(torch.frombuffer(bytearray(head), dtype=torch.uint8))

    def write(self, values: Tensor) -> None:
        """Append the next values of the file; they are copied.

        Args:
            values: contiguous, on the CPU, of the type of their tensor.
        """
        self._append(values.view(-1).view(torch.uint8))

    @property
    def sha256(self) -> str:
        """Hash of the file; valid once all is written."""
        return self._digest.hexdigest()

    def _append(self, data: Tensor) -> None:
        while data.numel():
            count = min(data.numel(), CHUNK_BYTES - self._filled)
            part = self._chunk[self._filled : self._filled + count]
            part.copy_(data[:count])
            self._digest.update(part.numpy().data)
            data = data[count:]
            self._filled += count
            self._given += count
            if self._filled == CHUNK_BYTES:
                self._send()
                self._chunk = self._free.get()  # waits for the disk where all are on their way

    def _send(self) -> None:
        """Give the chunk to a writer."""
        while self._writes and self._writes[0].done():
            self._writes.popleft().result()
        at = self._given - self._filled
        self._writes.append(self._writers.submit(self._put, self._chunk, self._filled, at))
        self._filled = 0

    def _put(self, chunk: Tensor, count: int, at: int) -> None:
        """Write a chunk; in a writer's thread. Plain writes are right at any place."""
        try:
            data = chunk.numpy().data[:count]
            if self._direct:
                whole = count - count % ALIGNMENT
                try:
                    self._write(data[:whole], at)
                    data, at = data[whole:], at + whole
                except OSError as error:
                    if error.errno != errno.EINVAL:  # that means: not in this file system
                        raise
                if data:
                    self._direct = False
                    _set_direct(self._descriptor, False)
            self._write(data, at)
            self._unflushed += len(data)
            if self._unflushed >= FLUSH_BYTES:
                self._unflushed = 0
                os.fdatasync(self._descriptor)
        finally:
            self._free.put(chunk)

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, at)
            data, at = data[written:], at + written

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._given == self._size, "values and header disagree"
                self._send()
                for write in self._writes:
                    write.result()  # an error of the disk is told once: fsync would not repeat it
                os.fsync(self._descriptor)
        finally:
            # First: a write that is under way would find another file behind the number of the descriptor.
            self._writers.shutdown(wait=True, cancel_futures=True)
            os.close(self._descriptor)


def _head(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of the file with its length in front, padded so that values start at a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.n_bytes],
        }
        begin += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Switch O_DIRECT of an open file on or off; whether it is on, for some file systems refuse it."""
    flag = getattr(os, "O_DIRECT", 0)  # Linux has it
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | flag if direct else flags & ~flag)
    except OSError:
        return False
    return direct and flag != 0
