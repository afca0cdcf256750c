"""Pieces of tensors read from any thread, into memory that is used again."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.places import ExportError, TensorPlace, tensor_places

ALIGNMENT = 4096
"""Of memory, place and length in a transfer past the page cache; a multiple of the block of every disk in use."""

DIRECT_BYTES = 1 << 20
"""Pieces from which on reading past the page cache pays: it has no read-ahead."""

PIECE_ELEMENTS = 1 << 20  # of one tensor, handled at a time: small enough for the caches, large enough for the disk


class Files:
    """Open files by path; each is opened once, and read at any place by any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._direct: dict[Path, int | None] = {}
        self._lock = threading.Lock()

    def descriptor(self, file: Path) -> int:
        """The descriptor of a file, opened for reading."""
        with self._lock:
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]

    def read(self, place: TensorPlace, begin: int, into: Tensor) -> None:
        """Fill ``into`` [N] (of the place's type, contiguous) with the values ``begin`` to ``begin + N``.

        Raises:
            ExportError: a file ends too early.
        """
        target = into.view(torch.uint8).numpy().data
        item = place.dtype.itemsize
        for file, at, first, last in place.parts(begin, into.numel()):
            self._fill(file, at, target[first * item : last * item], place.name)

    def fetch(self, place: TensorPlace, begin: int, count: int, buffers: Buffers, slot: int) -> Tensor:
        """The values ``begin`` to ``begin + count`` of a tensor that is read once, in memory of a slot of ``buffers``.

        Long pieces come straight from the disk, past the page cache: a copy less, and what others have in the cache
        stays there. They do not where the file system has no O_DIRECT.

        Raises:
            ExportError: a file ends too early.
        """
        parts = list(place.parts(begin, count))
        n_bytes = count * place.dtype.itemsize
        if len(parts) == 1 and n_bytes >= DIRECT_BYTES:
            file, at, _, _ = parts[0]
            descriptor = self._direct_descriptor(file)
            if descriptor is not None and at % place.dtype.itemsize == 0:
                skip = at % ALIGNMENT
                room = buffers.take_aligned(slot, -(-(skip + n_bytes) // ALIGNMENT) * ALIGNMENT)
                values = room[skip : skip + n_bytes]
                n_read = max(0, _read_direct(descriptor, room, at - skip) - skip)
                if n_read < n_bytes:
                    self._fill(file, at + n_read, values[n_read:].numpy().data, place.name)
                return values.view(place.dtype)
        into = buffers.take(slot, count, place.dtype)
        self.read(place, begin, into)
        return into

    def _direct_descriptor(self, file: Path) -> int | None:
        """A descriptor for reading past the page cache; None where that cannot be had."""
        with self._lock:
            if file not in self._direct:
                try:
                    self._direct[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
                except (OSError, AttributeError):  # the file system; the operating system
                    self._direct[file] = None
            return self._direct[file]

    def expect(self, place: TensorPlace, begin: int, count: int) -> None:
        """Tell the system that these values will be read soon, so that it fetches them ahead."""
        for file, at, first, last in place.parts(begin, count):
            n_bytes = (last - first) * place.dtype.itemsize
            os.posix_fadvise(self.descriptor(file), at, n_bytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, file: Path, at: int, target: memoryview, name: str) -> None:
        descriptor = self.descriptor(file)
        while target:
            n_read = os.preadv(descriptor, [target], at)
            if not n_read:
                raise ExportError(f"{file} ended inside {name}: it was changed while it was read")
            target, at = target[n_read:], at + n_read

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            for descriptor in [*self._open.values(), *self._direct.values()]:
                if descriptor is not None:
                    os.close(descriptor)
            self._open.clear()
            self._direct.clear()


def _read_direct(descriptor: int, into: Tensor, at: int) -> int:
    """Bytes read; 0 where the file system takes no such read."""
    try:
        return os.preadv(descriptor, [into.numpy().data], at)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


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


class ExportReader:
    """One model: where its tensors lie, and their values a piece at a time.

    Args:
        folder: with config.json and the tokenizer's files.
        places: of the tensors; None: those of the safetensors files in ``folder``.
        written_dtype: of the model that these values stand for, where they are stored in a wider one.
        origin: what the user named; None: the folder.
        documents: files besides those of the values that belong to the input; None: those in ``folder``.
        sealed: SHA-256 that files must have, where whoever wrote them noted it.
        release: called by ``close``.
    """

    def __init__(
        self,
        folder: Path,
        places: dict[str, TensorPlace] | None = None,
        written_dtype: torch.dtype | None = None,
        origin: Path | None = None,
        documents: Sequence[Path] | None = None,
        sealed: Mapping[Path, str] | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.folder = folder
        self.documents = None if documents is None else list(documents)
        self.sealed = dict(sealed or {})
        self._release = release
        self.origin = origin or folder
        self.places = tensor_places(folder) if places is None else places
        self.left_out: dict[str, TensorPlace] = {}
        """Tensors of the files that are none of the model's; their files still belong to the input."""
        self.written_dtype = written_dtype
        self.files = Files()

    def dtype_of(self, name: str) -> torch.dtype:
        """Type of a tensor of the model."""
        stored = self.places[name].dtype
        return stored if self.written_dtype is None or stored not in AVERAGED_DTYPES else self.written_dtype

    def add_alias(self, name: str, of: str) -> None:
        """Let ``name`` be a second name of the tensor ``of``."""
        self.places[name] = replace(self.places[of], name=name)

    def leave_out(self, name: str) -> None:
        """Count a tensor as none of the model's."""
        self.left_out[name] = self.places.pop(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor as flat pieces of at most ``PIECE_ELEMENTS`` values, in order; each is memory of its own."""
        place = self.places[name]
        for begin in range(0, place.elements, PIECE_ELEMENTS):
            piece = torch.empty(min(PIECE_ELEMENTS, place.elements - begin), dtype=place.dtype)
            self.files.read(place, begin, piece)
            yield piece

    def weight_files(self) -> list[Path]:
        """Every file that holds values, in the order of their paths."""
        places = [*self.places.values(), *self.left_out.values()]
        return sorted({span.file for place in places for span in place.spans})

    def close(self) -> None:
        """Close the files, and drop what was made for reading."""
        self.files.close()
        if self._release is not None:
            self._release()
            self._release = None
