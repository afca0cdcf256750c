"""Memory that packs are laid out in, used again when nothing refers to it any more.

A pack holds tens of megabytes of pixels. Fresh memory is handed over by the kernel page by page, zeroed, at the first
touch of each 4 KiB; for pixels that takes as long as a tenth of decoding them. So packs are laid out in slots that go
round: a slot is lent, tensors are made on it, and when the last of them is gone it is lent again.

A slot is as large as any pack of the stage may get. Pages that no pack has touched take no memory.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from keye_train.model.positions import PATCH_BYTES
from keye_train.settings import StageSettings

SLACK_BYTES = 2**20
"""Alignment of the single tensors, and numbers for each sample and image."""
TOKEN_BYTES = 128
"""A pack's tensors hold ids, labels, three positions and three numbers of the loss for each token: 64 bytes."""
KEPT_BYTES = 2**28
LARGEST_KEPT = 2**25  # glibc takes no larger one
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def slot_bytes(stage: StageSettings) -> int:
    """What every pack of a stage fits into."""
    return stage.max_patches * PATCH_BYTES + stage.max_tokens * TOKEN_BYTES + SLACK_BYTES


def map_file(descriptor: int, size: int) -> Tensor:
    """The bytes of an open file, shared with all who map it: [size] uint8. The descriptor may be closed then.

    Not ``mmap.mmap``, which keeps a descriptor for as long as it lives.
    """
    return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=torch.uint8)


def lend(slot: Tensor, give_back: Callable[[], object]) -> np.ndarray:
    """The bytes of a slot as an array that knows its end.

    Args:
        slot: [size] uint8.
        give_back: called once, when neither the array nor anything made on it is alive, by whichever thread dropped
            the last reference.
    """
    lent = slot.numpy()  # a new one each time; views of it hold it, for its own base is no array
    weakref.finalize(lent, give_back).atexit = False
    return lent


class PackMemory:
    """Slots of this process."""

    def __init__(self, size: int) -> None:
        """Args:
        size: bytes of a slot.
        """
        self._size = size
        self._free: list[Tensor] = []

    def lend(self) -> np.ndarray:
        """A slot with whatever it held before, [size] uint8; it comes back by itself."""
        slot = self._free.pop() if self._free else torch.frombuffer(mmap.mmap(-1, self._size), dtype=torch.uint8)
        return lend(slot, partial(self._free.append, slot))


def keep_freed_memory() -> None:
    """Let malloc keep up to ``KEPT_BYTES`` that were freed, where the C library is glibc.

    Pictures are allocated and freed in blocks of megabytes; without this, each goes back to the kernel and its pages
    are faulted in anew: with JPEGs of 640 x 480 a fifth of the time that decoding takes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
