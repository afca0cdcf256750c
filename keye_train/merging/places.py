"""Where the values of a model's tensors lie on the disk.

A safetensors file is: 8 bytes, the length N of the header, little-endian; N bytes of JSON,
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``; then the bytes of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from keye_train.runs import WEIGHTS, WEIGHTS_INDEX
from keye_train.settings import SettingsError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ExportError(SettingsError):
    """Files of an export that cannot be read."""


@dataclass(frozen=True)
class Span:
    """Values of a flattened tensor that lie side by side in a file."""

    file: Path
    begin_byte: int  # from the start of the file
    elements: int


@dataclass(frozen=True)
class TensorPlace:
    """Where one tensor stands."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    spans: tuple[Span, ...]  # in the order of the values; one in an export, several in a checkpoint of many ranks

    @property
    def file(self) -> Path:
        """The file of the first values."""
        return self.spans[0].file

    @property
    def begin_byte(self) -> int:
        """Where the first values stand in ``file``."""
        return self.spans[0].begin_byte

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the values."""
        return self.elements * self.dtype.itemsize

    def parts(self, begin: int, count: int) -> Iterator[tuple[Path, int, int, int]]:
        """Where the values ``begin`` to ``begin + count`` stand.

        Yields:
            For each span that has some of them: file, the byte of it where they start, and which of the ``count``
            values they are: first, and last + 1.
        """
        at = 0  # value of the tensor at which a span starts
        for span in self.spans:
            first, last = max(begin, at), min(begin + count, at + span.elements)
            if first < last:
                byte = span.begin_byte + (first - at) * self.dtype.itemsize
                yield span.file, byte, first - begin, last - begin
            at += span.elements


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
        if Path(name).name != name:
            raise ExportError(f"{index} names {name}, which lies outside the folder: it is damaged; copy it again")
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
        for place in file_places(file):
            if place.name in places:
                raise ExportError(f"{file} repeats the tensor {place.name} of {places[place.name].file}")
            places[place.name] = place
    return places


def file_places(file: Path) -> list[TensorPlace]:
    """All tensors of a safetensors file, in the order in which they lie in it.

    Raises:
        ExportError: it is cut off or no safetensors file.
    """
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
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ExportError(f"{file}: tensor {name} has dtype {entry['dtype']}; known are {sorted(DTYPES)}")
        begin, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        places.append(TensorPlace(name, dtype, shape, (Span(file, begin, math.prod(shape)),)))
        if begin != end or stop != begin + places[-1].n_bytes:
            raise ExportError(f"{broken}: the place of {name} in it does not fit its shape; copy it again")
        end = stop
    if end != size:
        raise ExportError(f"{broken}: its header promises {end} bytes, it has {size}; copy it again")
    return places
