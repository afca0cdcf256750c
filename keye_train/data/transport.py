"""How a pack gets from a reader process to the training process: its tensors lie in memory that both have mapped.

A slot (see ``memory``) is a nameless file in memory (memfd), made by the reader. With the first pack that lies in it,
its descriptor goes over the socket to the training process; both map it and close the descriptor. From then on a pack
is a short message: the pickled rest, and where in the slot each tensor stands. Pixels are not copied, neither the size
of /dev/shm nor the number of open files is a limit, and a reader may be ended at any moment: what the training process
has mapped stays.

The number of a slot that nothing refers to any more goes back to the reader with the next task.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import deque
from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any

import numpy as np
import torch

from keye_train.data.memory import lend, map_file

ALIGNMENT = 64  # bytes; a line of the cache

Place = tuple[int, int] | bytes
"""Start and length of a tensor in the slot, or its bytes where the slot is full."""


class Sender:
    """The reader's side."""

    def __init__(self, connection: Connection, size: int) -> None:
        """Args:
        connection: one end of a socket.
        size: bytes of a slot.
        """
        self._connection, self._size = connection, size
        self._slots: list[np.ndarray] = []
        self._free: list[int] = []
        self._descriptors: dict[int, int] = {}  # of slots that the other side has not seen yet

    def slot(self, freed: Iterable[int]) -> tuple[int, np.ndarray]:
        """Number and bytes of a free slot; ``freed``: numbers that came back."""
        self._free += freed
        if not self._free:
            self._free.append(len(self._slots))
            self._open()
        number = self._free.pop()
        return number, self._slots[number]

    def send(self, value: Any, number: int) -> None:
        """Send what was made while the slot ``number`` was taken; tensors that do not lie in it are copied there.

        Raises:
            BrokenPipeError: the other side is gone.
        """
        data, places = _dump(value, self._slots[number])
        descriptor = self._descriptors.pop(number, None)
        self._connection.send((number, None if descriptor is None else self._size, data, places))
        if descriptor is not None:
            send_handle(self._connection, descriptor, 0)  # the number of a process matters on Windows only
            os.close(descriptor)

    def _open(self) -> None:
        descriptor = os.memfd_create("keye-pack", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, self._size)
        self._descriptors[len(self._slots)] = descriptor
        self._slots.append(map_file(descriptor, self._size).numpy())


class Receiver:
    """The training process's side, for one reader."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._slots: dict[int, torch.Tensor] = {}
        self._freed: deque[int] = deque()

    def freed(self) -> list[int]:
        """Slots that came free since the last call."""
        return [self._freed.popleft() for _ in range(len(self._freed))]

    def receive(self) -> Any:
        """What was sent; its tensors lie in the slot, which comes free with the last of them.

        Raises:
            EOFError, OSError: the reader died.
        """
        number, size, data, places = self.connection.recv()
        if size is not None:
            descriptor = recv_handle(self.connection)
            try:
                self._slots[number] = map_file(descriptor, size)
            finally:
                os.close(descriptor)
        slot = lend(self._slots[number], partial(self._freed.append, number))
        buffers = [bytearray(p) if isinstance(p, bytes) else slot[p[0] : p[0] + p[1]] for p in places]
        return pickle.loads(data, buffers=buffers)


def _dump(value: Any, slot: np.ndarray) -> tuple[bytes, list[Place]]:
    """Pickle a value apart from its tensors, and say where these are."""
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), _places([np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers], slot)


class _Pickler(pickle.Pickler):
    """Writes tensors as arrays, where torch's own way would go through files in shared memory."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _places(tensors: Sequence[np.ndarray], slot: np.ndarray) -> list[Place]:
    """Where each tensor stands; those outside of the slot are copied behind all that stand in it."""
    origin = _address(slot)
    starts = [_address(tensor) - origin for tensor in tensors]
    inside = [0 <= start <= len(slot) - len(tensor) for start, tensor in zip(starts, tensors, strict=True)]
    end = max((s + len(t) for s, t, within in zip(starts, tensors, inside, strict=True) if within), default=0)
    places: list[Place] = []
    for start, tensor, within in zip(starts, tensors, inside, strict=True):
        if not within:
            start = -(-end // ALIGNMENT) * ALIGNMENT
            if start + len(tensor) > len(slot):
                places.append(tensor.tobytes())
                continue
            end = start + len(tensor)
            slot[start:end] = tensor
        places.append((start, len(tensor)))
    return places


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
