"""The weighted mean of models in memory, tensor by tensor: what ``keye-merge`` would write, without writing it.

Inputs stay in the page cache from one candidate to the next, so scoring many weights costs one pass of arithmetic each
and no disk space. Values are added in float64 and rounded once to the type of the first model, piece by piece as the
merge does, so a candidate that was scored is bit for bit the model that is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keye_train.merging.compatibility import MergeError, compare
from keye_train.merging.methods import AVERAGED_DTYPES, average
from keye_train.merging.reading import PIECE_ELEMENTS, ExportReader
from keye_train.merging.ties import drop_doubles


class Blend:
    """K models of one architecture, ready to be averaged with any weights."""

    def __init__(self, readers: Sequence[ExportReader]) -> None:
        """Args:
            readers: stay open as long as tensors are asked for.

        Raises:
            MergeError: the models differ in more than their values; it lists every reason.
        """
        problems = [one.text for one in (*drop_doubles(readers), *compare(readers))]
        if problems:
            raise MergeError(problems)
        self._readers = list(readers)

    def tensors(self, weights: Sequence[float]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of sum_i w_i x_i / sum_i w_i, in the type of the first model, on the CPU.

        Args:
            weights: one for each model, with a positive sum. Models of weight 0 take no part; negative ones are for
                places behind the ends of a line.

        Raises:
            MergeError: the mean of a tensor is not finite.
        """
        if len(weights) != len(self._readers) or not sum(weights) > 0:
            raise ValueError(
                f"weights {list(weights)}: one for each of {len(self._readers)} models, with a sum above 0"
            )
        first = self._readers[0]
        parts = [reader for reader, weight in zip(self._readers, weights, strict=True) if weight]
        shares = [weight for weight in weights if weight]
        for name, place in first.places.items():
            if place.dtype not in AVERAGED_DTYPES:  # equal in all models: the merge sees to it
                flat = torch.empty(place.elements, dtype=place.dtype)
                first.files.read(place, 0, flat)
                yield name, flat.reshape(place.shape)
                continue
            flat = torch.empty(place.elements, dtype=first.dtype_of(name))
            pieces = zip(*(reader.pieces(name) for reader in parts), strict=True)
            for number, side_by_side in enumerate(pieces):
                begin = number * PIECE_ELEMENTS
                flat[begin : begin + PIECE_ELEMENTS] = average(side_by_side, shares, flat.dtype)
            if not bool(torch.isfinite(flat).all()):
                raise MergeError([f"{name}: its mean with the weights {list(weights)} is not finite: check the inputs"])
            yield name, flat.reshape(place.shape)
