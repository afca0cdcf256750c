"""Exports on disk, read and written a piece at a time.

A safetensors file is: 8 bytes, the length N of the header, little-endian; N bytes of JSON,
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``; then the bytes of the tensors. Knowing the headers, the
whole output is laid out before the first tensor is read, so memory stays at a few pieces for models of any size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from keye_train.settings import SettingsError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PIECE_ELEMENTS = 1 << 20  # of one tensor, handled at a time: small enough for the caches, large enough for the disk

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ExportError(SettingsError):
    """Files of an export that cannot be read."""


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor stands."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin_byte: int  # from the start of the file

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return self.elements * self.dtype.itemsize


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an export, in the order of their names.

    Raises:
        FileNotFoundError: there are none, or the index names one that is absent.
    """
    index = folder / WEIGHTS_INDEX
    if not index.exists():
        names = [WEIGHTS]
    else:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing: the export is not whole; write it again")
    return [folder / name for name in names]


def tensor_places(folder: Path) -> dict[str, TensorPlace]:
    """All tensors of an export, in the order in which they lie on the disk.

    Raises:
        FileNotFoundError: a file is missing.
        ExportError: a file is cut off, is no safetensors file, or repeats a tensor of another file.
    """
    places: dict[str, TensorPlace] = {}
    for file in weight_files(folder):
        for place in _read_header(file):
            if place.name in places:
                raise ExportError(f"{file} repeats the tensor {place.name} of {places[place.name].file}")
            places[place.name] = place
    return places


def _read_header(file: Path) -> list[TensorPlace]:
    size = file.stat().st_size
    broken = f"{file} is not a whole safetensors file"
    with file.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise ExportError(
                f"{broken}: it has {size} bytes and its header alone claims {header_bytes}; copy it again"
            )
        try:
            header = json.loads(handle.read(header_bytes))
        except ValueError as error:
            raise ExportError(f"{broken}: its header is no JSON ({error}); copy it again") from error
    header.pop("__metadata__", None)
    places = []
    end = 8 + header_bytes
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in DTYPES:
            raise ExportError(f"{file}: tensor {name} has dtype {entry['dtype']}; known are {sorted(DTYPES)}")
        begin = 8 + header_bytes + entry["data_offsets"][0]
        places.append(TensorPlace(name, file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin))
        end = begin + places[-1].n_bytes
    if end != size:
        raise ExportError(f"{broken}: its header promises {end} bytes, it has {size}; copy it again")
    return places


class ExportReader:
    """Reads pieces of tensors; files stay open until ``close``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places = tensor_places(folder)
        self._files = ExitStack()
        self._handles: dict[Path, BufferedReader] = {}

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the tensor as flat pieces of at most ``PIECE_ELEMENTS`` values, in order."""
        place = self.places[name]
        if place.file not in self._handles:
            self._handles[place.file] = self._files.enter_context(place.file.open("rb"))
        handle = self._handles[place.file]
        for begin in range(0, place.elements, PIECE_ELEMENTS):
            count = min(PIECE_ELEMENTS, place.elements - begin)
            buffer = bytearray(count * place.dtype.itemsize)
            # Each piece seeks for itself: pieces of several tensors of one file may be read in turns.
            handle.seek(place.begin_byte + begin * place.dtype.itemsize)
            if handle.readinto(buffer) != len(buffer):
                raise ExportError(f"{place.file} ended inside {name}: it was changed while it was read")
            yield torch.frombuffer(buffer, dtype=place.dtype)

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        self._handles.clear()


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Sequence[PlannedTensor], max_shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """File name -> its tensors: in the given order, at most ``max_shard_bytes`` of values a file.

    A tensor larger than that gets a file of its own. One file is called model.safetensors, several
    model-00001-of-0000N.safetensors, as in the official layout.
    """
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


class ShardWriter:
    """Writes one safetensors file front to back and hashes it on the way; use as a context manager."""

    def __init__(self, file: Path, tensors: Sequence[PlannedTensor]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for tensor in tensors:
            begin, end = end, end + tensor.n_bytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the values start at a multiple of 8 bytes
        self.file = file
        self._size = 8 + len(text) + end
        self._digest = hashlib.sha256()
        self._handle = file.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def append(self, piece: Tensor) -> None:
        """Write the next values; tensors and their pieces come in the planned order."""
        self._write(piece.contiguous().view(torch.uint8).numpy().data)

    @property
    def sha256(self) -> str:
        """Hash of the file; valid once all is written."""
        return self._digest.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._handle.write(data)
        self._digest.update(data)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.flush()
        os.fsync(self._handle.fileno())
        assert kind is not None or self._handle.tell() == self._size, "values and header disagree"
        self._handle.close()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
