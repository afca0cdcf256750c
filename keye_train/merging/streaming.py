"""The engine: many threads read, merge and write pieces of tensors; the files have the same bits for any number.

Knowing all headers, the whole output is laid out before the first value is read. So a piece of the result has its place
whoever computes it, memory stays at a few pieces of each model, and SHA-256 of a file is taken in
order while later pieces are computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from keye_train.merging.methods import BLOCK
from keye_train.merging.places import DTYPE_NAMES, ExportError, TensorPlace, tensor_places
from keye_train.merging.reading import PIECE_ELEMENTS, Buffers, ExportReader, Files
from keye_train.runs import WEIGHTS, WEIGHTS_INDEX

__all__ = [
    "PIECE_ELEMENTS",
    "ExportError",
    "ExportReader",
    "Files",
    "PlannedTensor",
    "ShardFile",
    "TensorPlace",
    "Workers",
    "plan_shards",
    "tensor_places",
    "write_index",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUDGET_BYTES = 512 << 20  # for the values under way in all threads together
FLUSH_BYTES = 128 << 20  # written before the disk is told to begin; the rest of its cache is then never large


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return self.elements * self.dtype.itemsize


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """File name -> tensors, in order; a file has at most ``max_shard_bytes``, or one larger tensor."""
    shards: list[list[PlannedTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_index(folder: Path, shards: dict[str, list[PlannedTensor]]) -> None:
    """Write model.safetensors.index.json; an export of one file has none."""
    if len(shards) == 1:
        return
    index = {
        "metadata": {"total_size": sum(tensor.n_bytes for shard in shards.values() for tensor in shard)},
        "weight_map": {tensor.name: file for file, shard in shards.items() for tensor in shard},
    }
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def thread_bytes(models: int, has_base: bool, itemsize: int, blocks: int) -> int:
    """Most memory that one thread's share of the work takes, for pieces of ``blocks`` blocks.

    Args:
        models: pieces that one piece of work reads, that of the base included.
        has_base: deltas to a base are formed.
        itemsize: largest of the types, in bytes.
    """
    piece = BLOCK * blocks
    # Inputs; two results, one made and one that waits to be hashed; the magnitudes while a result is checked.
    n_bytes = piece * itemsize * (models + 3)
    if not has_base:
        # Float64 of one block: values that have to be sorted are stacked, sorted and numbered; the rest is rounding.
        return n_bytes + BLOCK * 8 * (3 * models + 8)
    # Deltas and masks besides; TIES' sizes of a piece, and its histograms: two being made, one that waits.
    n_bytes += BLOCK * 8 * (4 * models + models // 4 + 8) + piece * (4 * models + 40)
    return n_bytes + 3 * models * (1 << 16) * 8


def _fitting(threads: int, models: int, has_base: bool, itemsize: int) -> tuple[int, int]:
    """Threads, and blocks of a piece: as many, and as large, as fit in BUDGET_BYTES; at least one of each."""
    blocks = max(1, PIECE_ELEMENTS // BLOCK)
    while blocks > 1 and threads * thread_bytes(models, has_base, itemsize, blocks) > BUDGET_BYTES:
        blocks //= 2
    return max(1, min(threads, BUDGET_BYTES // thread_bytes(models, has_base, itemsize, blocks))), blocks


class Workers:
    """Threads that work on pieces; use as a context manager.

    Args:
        threads: how many; 0: twice the processors, so that some compute while others wait for the disk. Fewer run where
            so many would not fit in BUDGET_BYTES.
        models: pieces that one piece of work reads, that of the base included.
        has_base: deltas to a base are formed.
        itemsize: largest of the types of these pieces, in bytes.
    """

    def __init__(self, threads: int, models: int, has_base: bool = False, itemsize: int = 4) -> None:
        wanted = threads or 2 * len(os.sched_getaffinity(0))
        self.threads, blocks = _fitting(wanted, models, has_base, itemsize)
        if self.threads < wanted:
            log = logger.warning if threads else logger.info
            log("%d threads in place of %d: more do not fit in %d MiB", self.threads, wanted, BUDGET_BYTES >> 20)
        self.piece_elements = BLOCK * blocks
        """Values of one tensor that one piece of work takes: a multiple of BLOCK."""
        self.buffers = Buffers()
        self.outputs: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        """Memory for results: taken by a worker, given back by who used the result."""
        for _ in range(2 * self.threads + 1):
            self.outputs.put(torch.empty(0, dtype=torch.uint8))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")

    def in_order(self, tasks: Iterable[Callable[[], T]]) -> Generator[T]:
        """Results of the tasks in their order; a few tasks are under way or waiting at a time.

        Closing the generator early waits for those under way and drops those that wait.
        """
        running: deque[Future[T]] = deque()
        try:
            for task in tasks:
                if len(running) >= 2 * self.threads:
                    yield running.popleft().result()
                running.append(self._pool.submit(task))
            while running:
                yield running.popleft().result()
        finally:
            wait([future for future in running if not future.cancel()])

    def __enter__(self) -> Workers:
        # Each thread works on pieces of its own; threads inside of one operation would only contend.
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._torch_threads)


class ShardFile:
    """One safetensors file, written at any place by any thread and hashed in order; use as a context manager.

    Its whole size is reserved at once, so a full disk shows before the work is done.

    Raises:
        OSError: the disk is full.
    """

    def __init__(self, file: Path, tensors: Sequence[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        begins = {}
        for tensor in tensors:
            begins[tensor.name], end = end, end + tensor.n_bytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begins[tensor.name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8 bytes
        head = len(text).to_bytes(8, "little") + text
        self.file = file
        self._begins = {name: len(head) + begin for name, begin in begins.items()}
        self._size = len(head) + end
        self._digest = hashlib.sha256()
        self._hashed = self._flushed = 0
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flush: Future[None] | None = None
        self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(self._descriptor, 0, self._size)
            self._write(memoryview(head), 0)
        except BaseException:
            os.close(self._descriptor)
            raise
        self._hash(memoryview(head))

    def write(self, name: str, begin: int, piece: Tensor) -> None:
        """Write the values of a tensor from the value ``begin`` on; from any thread."""
        self._write(_raw(piece), self._begins[name] + begin * piece.dtype.itemsize)

    def hash(self, piece: Tensor) -> None:
        """Take the next values of the file into its checksum; in the order of the file."""
        self._hash(_raw(piece))
        if self._hashed - self._flushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            if self._flush is not None:
                self._flush.result()
            self._flushed = self._hashed
            self._flush = self._flusher.submit(os.fdatasync, self._descriptor)

    @property
    def sha256(self) -> str:
        """Hash of the file; valid once all is written."""
        return self._digest.hexdigest()

    def _write(self, data: memoryview, at: int) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, at)
            data, at = data[written:], at + written

    def _hash(self, data: memoryview) -> None:
        self._digest.update(data)
        self._hashed += len(data)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flusher.shutdown(wait=True)
        try:
            if kind is None:
                assert self._hashed == self._size, "values and header disagree"
                if self._flush is not None:
                    self._flush.result()  # an error of the disk is told once: fsync would not repeat it
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _raw(piece: Tensor) -> memoryview:
    return piece.view(-1).view(torch.uint8).numpy().data
