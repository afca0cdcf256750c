"""Memory that is used again: asking the system for megabytes anew costs more than to compute with them."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Of memory, place and length in a transfer past the page cache; a multiple of the block of every disk in use."""


class Buffers(threading.local):
    """Memory of one thread, by slot, that grows to what was asked for and is used again."""

    def __init__(self) -> None:
        self._memory: dict[int, Tensor] = {}

    def take(self, slot: int, count: int, dtype: torch.dtype) -> Tensor:
        """[count] of ``dtype``; what the slot gave before is overwritten."""
        return self.take_aligned(slot, count * dtype.itemsize).view(dtype)

    def take_aligned(self, slot: int, n_bytes: int) -> Tensor:
        """[n_bytes] uint8 as ``take`` gives it; its address is a multiple of ALIGNMENT."""
        memory = self._memory.get(slot)
        if memory is None or memory.numel() < n_bytes:
            memory = torch.empty(n_bytes + ALIGNMENT, dtype=torch.uint8)
            memory = self._memory[slot] = memory[-memory.data_ptr() % ALIGNMENT :]
        return memory[:n_bytes]
