"""Several models side by side: the same values of all of them, a window at a time, in bounded memory.

Plain reads, not memory maps: mapped pages would count as resident memory, and there is nothing to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keye_train.merging.reading import ExportReader

MOST_ELEMENTS = 1 << 20
"""Values of one tensor in a window: sums of that many signs are exact in float32."""


class Windows:
    """Reads K models of the same tensors in step."""

    def __init__(self, readers: Sequence[ExportReader], budget_bytes: int = 256 * 2**20) -> None:
        """Args:
        readers: the first decides which tensors there are.
        budget_bytes: what one window of all models may take as float64, with as much again for the arithmetic.
        """
        self._readers = list(readers)
        self.elements = max(1024, min(MOST_ELEMENTS, budget_bytes // (16 * len(self._readers))))

    def read(self, name: str) -> Iterator[Tensor]:
        """Windows of a tensor: [K, N] float64, N at most ``elements``; row k belongs to model k."""
        total = self._readers[0].places[name].elements
        for begin in range(0, total, self.elements):
            count = min(self.elements, total - begin)
            window = torch.empty(len(self._readers), count, dtype=torch.float64)
            for row, reader in zip(window, self._readers, strict=True):
                values = torch.empty(count, dtype=reader.places[name].dtype)
                reader.files.read(reader.places[name], begin, values)
                row.copy_(values)
            yield window
