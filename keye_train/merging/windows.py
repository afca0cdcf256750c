"""Several exports side by side: the same values of all of them, a window at a time, in bounded memory.

Plain reads, not memory maps: mapped pages would count as resident memory, and there is nothing to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from keye_train.merging.streaming import Files, TensorPlace, tensor_places

MOST_ELEMENTS = 1 << 20
"""Values of one tensor in a window: sums of that many signs are exact in float32."""


class Windows:
    """Reads K exports of the same tensors in step; use as a context manager."""

    def __init__(self, folders: Sequence[Path], budget_bytes: int = 256 * 2**20) -> None:
        """Args:
            folders: exports; the first decides which tensors there are.
            budget_bytes: what one window of all exports may take as float64, with as much again for the arithmetic.

        Raises:
            FileNotFoundError, ExportError: a file is missing or broken.
        """
        self.folders = list(folders)
        self.places: list[dict[str, TensorPlace]] = [tensor_places(folder) for folder in folders]
        self.elements = max(1024, min(MOST_ELEMENTS, budget_bytes // (16 * len(self.folders))))
        self._files = Files()

    def read(self, name: str) -> Iterator[Tensor]:
        """Windows of a tensor: [K, N] float64, N at most ``elements``; row k belongs to export k."""
        total = self.places[0][name].elements
        for begin in range(0, total, self.elements):
            count = min(self.elements, total - begin)
            window = torch.empty(len(self.places), count, dtype=torch.float64)
            for row, places in zip(window, self.places, strict=True):
                values = torch.empty(count, dtype=places[name].dtype)
                self._files.read(places[name], begin, values)
                row.copy_(values)
            yield window

    def __enter__(self) -> Windows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()
