"""Pieces of tensors read from any thread, into memory that is used again."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from keye_train.merging.buffers import ALIGNMENT, Buffers
from keye_train.merging.methods import AVERAGED_DTYPES
from keye_train.merging.places import ExportError, TensorPlace, tensor_places
from keye_train.settings import SettingsError

DIRECT_BYTES = 1 << 20
"""Pieces from which on reading past the page cache pays: it has no read-ahead."""

SAMPLES = 64
"""Bytes of a file that are looked for in the page cache."""

PIECE_ELEMENTS = 1 << 21  # of one tensor, handled at a time: large enough for the disk, and for threads to seldom meet


class Files:
    """Open files by path, read at any place by any thread.

    Args:
        limit: descriptors that stay open between two reads, those used last: a model may have more files than a process
            may open. A file can take two, one of them for reading past the page cache.
    """

    def __init__(self, limit: int = 64) -> None:
        self.limit = limit
        self._open: OrderedDict[tuple[Path, bool], int | None] = OrderedDict()  # used last: at the end
        self._users: Counter[tuple[Path, bool]] = Counter()  # threads that read at this moment
        self._cached: dict[Path, bool] = {}
        self._lock = threading.Lock()

    @contextmanager
    def _opened(self, file: Path, direct: bool = False) -> Iterator[int | None]:
        """A descriptor, open inside the block; None where one past the page cache (``direct``) cannot be had."""
        key = file, direct
        with self._lock:
            if key not in self._open:
                self._close_unused(self.limit - 1)
                self._open[key] = _open_direct(file) if direct else os.open(file, os.O_RDONLY)
            self._open.move_to_end(key)
            self._users[key] += 1
            descriptor = self._open[key]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[key] -= 1
                self._close_unused(self.limit)

    def _close_unused(self, left: int) -> None:
        """Close what no thread reads, longest unused first, until ``left`` are open."""
        for key in [key for key in self._open if not self._users[key]] if len(self._open) > left else ():
            if len(self._open) <= left:
                return
            descriptor = self._open.pop(key)
            del self._users[key]
            if descriptor is not None:
                os.close(descriptor)

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
        stays there. They do not where the cache holds the file already, or the file system has no O_DIRECT.

        Raises:
            ExportError: a file ends too early.
        """
        parts = list(place.parts(begin, count))
        n_bytes = count * place.dtype.itemsize
        if len(parts) == 1 and n_bytes >= DIRECT_BYTES:
            file, at, _, _ = parts[0]
            if at % place.dtype.itemsize == 0 and not self._is_cached(file):
                return self._fetch_direct(file, at, n_bytes, buffers, slot, place.name).view(place.dtype)
        into = buffers.take(slot, count, place.dtype)
        self.read(place, begin, into)
        return into

    def _fetch_direct(self, file: Path, at: int, n_bytes: int, buffers: Buffers, slot: int, name: str) -> Tensor:
        skip = at % ALIGNMENT
        room = buffers.take_aligned(slot, -(-(skip + n_bytes) // ALIGNMENT) * ALIGNMENT)
        values = room[skip : skip + n_bytes]
        with self._opened(file, direct=True) as descriptor:
            n_read = 0 if descriptor is None else max(0, _read_direct(descriptor, room, at - skip) - skip)
        if n_read < n_bytes:
            self._fill(file, at + n_read, values[n_read:].numpy().data, name)
        return values

    def _is_cached(self, file: Path) -> bool:
        if file not in self._cached:
            self._cached[file] = _in_page_cache(file)
        return self._cached[file]

    def expect(self, place: TensorPlace, begin: int, count: int) -> None:
        """Tell the system that these values will be read soon, so that it fetches them ahead."""
        for file, at, first, last in place.parts(begin, count):
            n_bytes = (last - first) * place.dtype.itemsize
            with self._opened(file) as descriptor:
                assert descriptor is not None
                os.posix_fadvise(descriptor, at, n_bytes, os.POSIX_FADV_WILLNEED)

    def _fill(self, file: Path, at: int, target: memoryview, name: str) -> None:
        with self._opened(file) as descriptor:
            assert descriptor is not None
            while target:
                n_read = os.preadv(descriptor, [target], at)
                if not n_read:
                    raise ExportError(f"{file} ended inside {name}: it was changed while it was read")
                target, at = target[n_read:], at + n_read

    def close(self) -> None:
        """Close all files, once no thread reads."""
        with self._lock:
            self._close_unused(0)


def open_files_each(models: int) -> int:
    """Descriptors that each of several models may keep open: half of those of the process, in equal parts.

    Raises:
        SettingsError: too few, one for reading past the page cache and one through it.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        allowed = 1 << 20
    each = allowed // 2 // max(1, models)
    if each < 2:
        raise SettingsError(
            f"{models} models need {4 * models} open files, and this process may open {allowed}: raise the limit with "
            f"ulimit -n {4 * models}, or name fewer models"
        )
    return each


def _open_direct(file: Path) -> int | None:
    try:
        return os.open(file, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # the file system; the operating system
        return None


def _in_page_cache(file: Path) -> bool:
    """Whether the page cache seems to hold a file, as it does that of a model that was just trained: by samples."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        size, sample = os.fstat(descriptor).st_size, bytearray(1)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # asking must not make it read ahead
        return all(os.preadv(descriptor, [sample], size * n // SAMPLES, os.RWF_NOWAIT) for n in range(SAMPLES))
    except (OSError, AttributeError):  # not there, or the system cannot say: EAGAIN, EOPNOTSUPP
        return False
    finally:
        os.close(descriptor)


def _read_direct(descriptor: int, into: Tensor, at: int) -> int:
    """Bytes read; 0 where the file system takes no such read."""
    try:
        return os.preadv(descriptor, [into.numpy().data], at)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0


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
