"""The weighted mean of exports in memory, tensor by tensor: what ``keye-merge`` would write, without writing it.

Inputs are memory-mapped and stay in the page cache from one candidate to the next, so scoring many weights costs one
pass of arithmetic each and no disk space. Values are added in float64 and rounded once to the type of the first
export, piece by piece as the merge does, so a candidate that was scored is bit for bit the model that is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keye_train.merging.compatibility import MergeError, differences
from keye_train.merging.methods import AVERAGED_DTYPES, average
from keye_train.merging.streaming import PIECE_ELEMENTS, ExportReader, TensorPlace, tensor_places


class Blend:
    """K exports of one architecture, ready to be averaged with any weights."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises:
        FileNotFoundError, ExportError: a file is missing or broken.
        MergeError: the exports differ in more than their values; it lists every reason.
        """
        readers = [ExportReader(folder) for folder in folders]
        try:
            problems = differences(readers)
        finally:
            for reader in readers:
                reader.close()
        if problems:
            raise MergeError(problems)
        self.folders = list(folders)
        self._places = [tensor_places(folder) for folder in folders]
        files = {place.file for places in self._places for place in places.values()}
        # Mode "c": pages are private if written, so torch may hold them; nothing writes.
        self._maps = {file: np.memmap(file, dtype=np.uint8, mode="c") for file in files}

    def tensors(self, weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of sum_i w_i x_i / sum_i w_i, in the type of the first export, on the CPU.

        Args:
            weights: one for each export, with a positive sum. Models of weight 0 take no part; negative ones are for
                places behind the ends of a line.

        Raises:
            MergeError: the mean of a tensor is not finite.
        """
        if len(weights) != len(self.folders) or not sum(weights) > 0:
            raise ValueError(f"weights {list(weights)}: one for each of {len(self.folders)} models, with a sum above 0")
        parts = [(places, weight) for places, weight in zip(self._places, weights, strict=True) if weight]
        for name, place in self._places[0].items():
            if place.dtype not in AVERAGED_DTYPES:  # equal in all models: the merge sees to it
                yield name, self._values(place).clone().reshape(place.shape)
                continue
            flat = torch.empty(place.elements, dtype=place.dtype)
            sources = [self._values(places[name]) for places, _ in parts]
            for begin in range(0, place.elements, PIECE_ELEMENTS):
                end = min(begin + PIECE_ELEMENTS, place.elements)
                pieces = [source[begin:end] for source in sources]
                flat[begin:end] = average(pieces, [weight for _, weight in parts], place.dtype)
            if not bool(torch.isfinite(flat).all()):
                raise MergeError([f"{name}: its mean with the weights {list(weights)} is not finite: check the inputs"])
            yield name, flat.reshape(place.shape)

    def _values(self, place: TensorPlace) -> Tensor:
        raw = self._maps[place.file][place.begin_byte : place.begin_byte + place.n_bytes]
        return torch.from_numpy(raw).view(place.dtype)
