"""The engine: many threads read and merge pieces of tensors, one puts the results into the files, in their order.

Knowing all headers, the whole output is laid out before the first value is read. So the files have the same bits for
any number of threads, and memory stays at a few pieces of each model.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from keye_train.merging.buffers import Buffers
from keye_train.merging.methods import BLOCK, SORTED, STRIDE
from keye_train.merging.reading import PIECE_ELEMENTS
from keye_train.merging.shard_file import PlannedTensor
from keye_train.runs import WEIGHTS, WEIGHTS_INDEX

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUDGET_BYTES = 512 << 20  # for the values under way in all threads together
ENOUGH = 6
"""Threads that keep a disk busy."""


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
    # Inputs; two results, one made and one that waits to be written; the magnitudes while a result is checked.
    n_bytes = piece * itemsize * (models + 3)
    if not has_base:
        # Float64: values that have to be sorted are stacked, sorted and numbered; sums, and their rounding.
        return n_bytes + SORTED * 8 * 3 * models + min(STRIDE, piece) * 8 * 8
    # Deltas and masks besides; TIES' sizes of a piece, and its histograms: two being made, one that waits.
    n_bytes += BLOCK * 8 * (4 * models + models // 4 + 8) + piece * (4 * models + 40)
    return n_bytes + 3 * models * (1 << 16) * 8


def _fitting(threads: int, models: int, has_base: bool, itemsize: int) -> tuple[int, int]:
    """Threads, and blocks of a piece: as many, and as large, as fit in BUDGET_BYTES; at least one of each.

    Pieces are made smaller for ENOUGH threads, not for more: the disk takes small ones slowly.
    """
    blocks = max(1, PIECE_ELEMENTS // BLOCK)
    while blocks > 1 and min(threads, ENOUGH) * thread_bytes(models, has_base, itemsize, blocks) > BUDGET_BYTES:
        blocks //= 2
    return max(1, min(threads, BUDGET_BYTES // thread_bytes(models, has_base, itemsize, blocks))), blocks


class Workers:
    """Threads that work on pieces; use as a context manager.

    Args:
        threads: how many; 0: three times the processors, so that some compute while others wait for the disk. Fewer
            run where so many would not fit in BUDGET_BYTES.
        models: pieces that one piece of work reads, that of the base included.
        has_base: deltas to a base are formed.
        itemsize: largest of the types of these pieces, in bytes.
    """

    def __init__(self, threads: int, models: int, has_base: bool = False, itemsize: int = 4) -> None:
        processors = len(os.sched_getaffinity(0))
        wanted = threads or 3 * processors
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
        self.computing = threading.BoundedSemaphore(min(self.threads, processors))
        """Held while values are computed: more threads than processors would only take turns at the interpreter."""
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="merge")

    def in_order(self, tasks: Iterable[Callable[[], T]], give_up: Callable[[], None] | None = None) -> Generator[T]:
        """Results of the tasks in their order; a few tasks are under way or waiting at a time.

        Closing the generator early, or an error, waits for those under way and drops those that wait.

        Args:
            tasks: taken as they are needed.
            give_up: called before that; lets no task wait for what one that is dropped would have done.
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
            if running and give_up is not None:
                give_up()
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
