"""Reading a checkpoint of any world size and ZeRO stage: any part of any parameter, memory-mapped."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from keye_train import runs
from keye_train.checkpoints.layout import INDEX, STATES, WEIGHTS, Slice, gap, slice_key

PIECE_ELEMENTS = 1 << 20


class CheckpointReader:
    """The parameters and optimizer states of a whole checkpoint.

    Only what is asked for is read, and only the files that hold it are opened. Whether the folder is whole and its
    checksums hold is another question: :func:`keye_train.checkpoints.fault` answers it.

    Args:
        folder: ``RUN/checkpoints/step-N``.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: the index does not cover a parameter.
    """

    dtype = torch.float32
    """Of all values."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}  # format 1: file of each tensor
        self._whole_tensors = not (self.folder / INDEX).exists()
        if self._whole_tensors:
            self._read_format_1()
            return
        index = runs.read_json(self.folder / INDEX)
        self.states: tuple[str, ...] = tuple(index["states"])
        """What there is of each parameter: ``weights``, ``exp_avg``, ``exp_avg_sq`` and, of some runs, ``average``."""
        self._shapes = {name: tuple(entry["shape"]) for name, entry in index["parameters"].items()}
        self._slices = {
            name: [Slice(start, stop, index["files"][file]) for file, start, stop in entry["slices"]]
            for name, entry in index["parameters"].items()
        }
        for name, shape in self._shapes.items():
            fault = gap(self._slices[name], math.prod(shape))
            if fault is not None:
                raise ValueError(f"{self.folder}: {fault} of {name}: take another checkpoint")

    def names(self) -> list[str]:
        """Official names of the trained parameters, in the order of the model."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._shapes[name]

    def pieces(self, name: str, state: str = WEIGHTS, max_elements: int = PIECE_ELEMENTS) -> Iterator[Tensor]:
        """The flattened parameter in order, as flat fp32 pieces of at most ``max_elements`` values."""
        for one in self._slices[name]:
            for start in range(one.start, one.stop, max_elements):
                yield self._part(one, name, state, start, min(start + max_elements, one.stop))

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened parameter: fp32 [stop - start], on the CPU."""
        slices = self._slices[name]
        first = max(bisect_right(slices, start, key=lambda one: one.start) - 1, 0)
        parts = []
        for one in slices[first:]:
            if one.start >= stop:
                break
            parts.append(self._part(one, name, state, max(start, one.start), min(stop, one.stop)))
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def tensor(self, name: str, state: str = WEIGHTS) -> Tensor:
        """A whole parameter, or a state of it, in its shape."""
        shape = self._shapes[name]
        return self.read(name, state, 0, math.prod(shape)).view(shape)

    def check_fits(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError unless the checkpoint holds exactly the trained parameters ``shapes``."""
        odd = sorted(set(self._shapes) ^ set(shapes))
        if odd:
            where = "only in the checkpoint" if odd[0] in self._shapes else "missing in the checkpoint"
            raise ValueError(
                f"{self.folder}: the set of trained parameters changed ({len(odd)} differ, first: {odd[0]}, {where}). "
                "Resume with the recipe that wrote it, or start a new run_dir with parent=<export>"
            )
        for name, shape in shapes.items():
            if self._shapes[name] != tuple(shape):
                raise ValueError(
                    f"{self.folder}: {name} has shape {self._shapes[name]}, not {tuple(shape)}: another model wrote it"
                )

    def _part(self, one: Slice, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the parameter, which lie in the slice ``one``."""
        if self._whole_tensors:
            key = name if state == WEIGHTS else f"{name}#{state}"
            return self._files[self._file_of[key]].get_tensor(key).flatten()[start:stop]
        if one.file not in self._files:
            self._files[one.file] = safe_open(self.folder / one.file, framework="pt")
        stored = self._files[one.file].get_slice(slice_key(state, name, one.start, one.stop))
        return stored[start - one.start : stop - one.start]

    def _read_format_1(self) -> None:
        """Format 1, of older versions: whole tensors by name, so each is one slice."""
        self._shapes, self._slices = {}, {}
        states = {WEIGHTS}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._files[path.name] = safe_open(path, framework="pt")
            for key in self._files[path.name].keys():  # noqa: SIM118 (not a dict)
                name, _, state = key.partition("#")
                self._file_of[key] = path.name
                states.add(state or WEIGHTS)
                if not state:
                    shape = tuple(self._files[path.name].get_slice(key).get_shape())
                    self._shapes[name] = shape
                    self._slices[name] = [Slice(0, math.prod(shape), path.name)]
        if not self._shapes:
            raise FileNotFoundError(f"{self.folder} holds no checkpoint: neither {INDEX} nor tensors")
        self.states = tuple(state for state in STATES if state in states)
