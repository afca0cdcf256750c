"""Writing a checkpoint's files: front to back, hashed on the way, flushed to the disk.

The layout of safetensors is written here and not by the library, which copies every tensor into Python bytes first and
holds the interpreter lock meanwhile. Hashing and writing blocks of 8 MiB release the lock: training goes on beside.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keye_train import runs
from keye_train.checkpoints.layout import FORMAT, INDEX, Slice, gap, slice_key

BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class NamedSlice:
    """A slice of one state of a parameter, to be written."""

    state: str
    name: str
    start: int  # in the flattened parameter
    elements: int

    @property
    def stop(self) -> int:
        """End of the slice."""
        return self.start + self.elements

    @property
    def key(self) -> str:
        """Name in the file."""
        return slice_key(self.state, self.name, self.start, self.stop)


def write_slices(path: Path, slices: Sequence[NamedSlice], values: Callable[[int], Tensor]) -> dict[str, Any]:
    """Write a file of slices and flush it to the disk.

    Args:
        path: file to write.
        slices: what it holds, in this order.
        values: values of the slice of a number: flat, fp32, contiguous, on the CPU. Asked for one after another.

    Returns:
        The seal of the file: its size and SHA-256.

    Raises:
        OSError: the disk is full, or fails.
    """
    header: dict[str, Any] = {}
    end = 0
    for one in slices:
        begin, end = end, end + one.elements * torch.float32.itemsize
        header[one.key] = {"dtype": "F32", "shape": [one.elements], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8 bytes
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(data: memoryview) -> None:
            for at in range(0, len(data), BLOCK_BYTES):
                block = data[at : at + BLOCK_BYTES]
                digest.update(block)
                while block:  # a raw write may take less than it was given
                    block = block[file.write(block) :]

        put(memoryview(len(text).to_bytes(8, "little") + text))
        for number, one in enumerate(slices):
            tensor = values(number)
            assert tensor.numel() == one.elements, f"{one.key} has {tensor.numel()} values"
            assert tensor.dtype == torch.float32, f"{one.key} is {tensor.dtype}"
            put(tensor.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
        size = file.tell()
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_index(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], states: Sequence[str], slices: Mapping[str, Iterable[Slice]]
) -> None:
    """Write index.json of a checkpoint whose files are all there.

    Args:
        folder: of the checkpoint.
        shapes: of each parameter.
        states: that the files hold of each parameter.
        slices: of each parameter.

    Raises:
        RuntimeError: the slices do not cover a parameter once: the ranks disagree about who owns what.
    """
    ordered = {name: sorted(slices.get(name, ())) for name in shapes}
    for name, shape in shapes.items():
        fault = gap(ordered[name], torch.Size(shape).numel())
        if fault is not None:
            raise RuntimeError(f"{folder}: {fault} of {name}; the ranks did not write what they hold")
    files = sorted({one.file for held in ordered.values() for one in held})
    number = {file: place for place, file in enumerate(files)}
    index = {
        "format": FORMAT,
        "states": list(states),
        "files": files,
        "parameters": {
            name: {
                "shape": list(shape),
                "slices": [[number[one.file], one.start, one.stop] for one in ordered[name]],
            }
            for name, shape in shapes.items()
        },
    }
    runs.write_text_atomic(folder / INDEX, json.dumps(index, separators=(",", ":")) + "\n")
