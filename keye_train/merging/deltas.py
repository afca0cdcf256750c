"""Methods on deltas to a common base: task arithmetic, TIES, DARE.

Deltas are formed in float64. What a method needs to know of a whole tensor comes from exact counts over its pieces:
the k-th largest delta by its bits, in two passes of histograms; the seed of a mask by a checksum of the values.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from keye_train.merging.methods import BLOCK, round_once, scan_values, weighted_sum

T = TypeVar("T")
Scan = Callable[[Callable[[Sequence[Tensor], int], T]], Iterator[T]]
"""``scan(look)`` gives look(pieces, begin) for all aligned pieces of a tensor, in order: one pass over its values."""

_DRAWS_PER_COUNT = 8  # Philox gives four 64-bit numbers a count, and a value takes 32 bits


@dataclass(frozen=True)
class DeltaRule:
    """base + scale * (what the deltas make together), for one tensor; the last piece is the base's.

    Task arithmetic (Ilharco et al. 2023, "Editing models with task arithmetic", section 2): base + sum_i w_i d_i.

    TIES (Yadav et al. 2023, "TIES-Merging", algorithm 1): (1) trim: values of a delta below its ``thresholds`` become
    0; (2) elect: the sign of each value is that of sum_i w_i d_i; (3) disjoint mean: over the deltas that are not 0 and
    have that sign. The paper has equal weights and trims over the whole model; here it is each tensor for itself, so
    that one pass over a tensor is enough.

    DARE (Yu et al. 2024, "Language models are super Mario"): values of a delta are kept with probability
    ``density`` and divided by it, then merged as task arithmetic (dare_linear) or as TIES' steps 2 and 3 (dare_ties).

    Models equal to the base give the base, bit for bit, and the order of the models changes no bit.
    """

    weights: Sequence[float]
    elect: bool = False
    scale: float = 1.0
    thresholds: Sequence[float] | None = None  # of |delta| in float32, one for each model
    keys: Sequence[int] | None = None  # of the masks, one for each model
    density: float = 1.0

    def __call__(self, pieces: Sequence[Tensor], begin: int, out: Tensor) -> bool:
        """Merge aligned flat pieces that start at the value ``begin`` (a multiple of BLOCK) of the tensor into ``out``.

        Returns:
            Whether all inputs and results are finite.
        """
        for start in range(0, out.numel(), BLOCK):
            *blocks, base = (piece[start : start + BLOCK] for piece in pieces)
            finite, exact = scan_values([*blocks, base], terms=2 * len(blocks))
            if not finite:
                return False
            origin = base.double()
            deltas = [block.double().sub_(origin) for block in blocks]
            if self.keys is not None:
                exact = False
                for delta, key in zip(deltas, self.keys, strict=True):
                    delta.mul_(kept(key, begin + start, delta.numel(), self.density)).div_(self.density)
            if self.thresholds is not None:
                for delta, threshold in zip(deltas, self.thresholds, strict=True):
                    delta[delta.float().abs() < threshold] = 0
            together = _elected_mean(deltas, self.weights, exact) if self.elect else None
            if together is None:
                together = weighted_sum(deltas, self.weights, exact)
            if self.scale != 1:
                together.mul_(self.scale)
            # base + 0 would lose the sign of a zero.
            merged = torch.where(together == 0, origin, origin + together)
            out[start : start + BLOCK] = round_once(merged, out.dtype)
        return scan_values([out])[0]


def _elected_mean(deltas: Sequence[Tensor], weights: Sequence[float], exact: bool) -> Tensor:
    sign = torch.sign(weighted_sum(deltas, weights, exact))
    agree = [(torch.sign(delta) == sign) & (sign != 0) for delta in deltas]
    # Values that sums with fewer terms hold are held exactly as well.
    total = weighted_sum([delta.mul_(same) for delta, same in zip(deltas, agree, strict=True)], weights, exact)
    share = weighted_sum(agree, weights, exact=True)
    return torch.where(share > 0, total / share, 0.0)


def trim_thresholds(scan: Scan, models: int, elements: int, density: float) -> list[float]:
    """For each model the k-th largest |delta| of a tensor, k = density * elements, rounded down but at least 1.

    Exact selection in two passes: deltas are rounded to float32, whose bits, read as integers, have the order of the
    sizes; the first pass counts their upper halves, the second the lower halves of those that share the upper half of
    the k-th. Values equal to the k-th are all kept. Memory: 2^16 counts for each model.

    Args:
        scan: passes over the tensor; the last piece is the base's.
        models: number of models K.
        elements: values of the tensor.
        density: share that is kept.
    """
    keep = max(1, int(density * elements))

    def upper(pieces: Sequence[Tensor], begin: int) -> npt.NDArray[np.int64]:
        return np.stack([np.bincount(bits >> 16, minlength=1 << 15) for bits in _sizes(pieces)])

    counts = _added(scan(upper))
    tops, above = zip(*(_bin_of(row, keep) for row in counts), strict=True)

    def lower(pieces: Sequence[Tensor], begin: int) -> npt.NDArray[np.int64]:
        sizes = _sizes(pieces)
        return np.stack(
            [
                np.bincount(bits[bits >> 16 == top] & 0xFFFF, minlength=1 << 16)
                for bits, top in zip(sizes, tops, strict=True)
            ]
        )

    counts = _added(scan(lower))
    thresholds = []
    for row in range(models):
        low, _ = _bin_of(counts[row], keep - above[row])
        thresholds.append(float(np.int32(tops[row] << 16 | low).view(np.float32)))
    return thresholds


def _sizes(pieces: Sequence[Tensor]) -> list[npt.NDArray[np.int32]]:
    """Bits of |delta| in float32."""
    *models, base = pieces
    origin = base.double()
    return [(model.double() - origin).float().abs().numpy().view(np.int32) for model in models]


def _added(parts: Iterator[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    total = next(parts).copy()
    for part in parts:
        total += part
    return total


def _bin_of(counts: npt.NDArray[np.int64], keep: int) -> tuple[int, int]:
    """The bin of the ``keep``-th largest value, and how many values lie in the bins above it."""
    from_above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_above, keep))
    return len(counts) - 1 - place, int(from_above[place] - counts[len(counts) - 1 - place])


def mask_keys(scan: Scan, models: int, name: str, seed: int) -> list[int]:
    """A 128-bit key for the mask of each model.

    It depends on the seed, the tensor's name and the model's values (CRC-32 of its blocks), not on where the model
    lies, the order of the models, or threads. Two models with the same tensor get the same mask.
    """

    def look(pieces: Sequence[Tensor], begin: int) -> list[bytes]:
        return [
            b"".join(
                zlib.crc32(piece[start : start + BLOCK].view(torch.uint8).numpy().data).to_bytes(4, "little")
                for start in range(0, piece.numel(), BLOCK)
            )
            for piece in pieces[:models]
        ]

    digests = [hashlib.blake2b(f"{seed}/{name}/".encode(), digest_size=16) for _ in range(models)]
    for sums in scan(look):
        for digest, checksums in zip(digests, sums, strict=True):
            digest.update(checksums)
    return [int.from_bytes(digest.digest(), "little") for digest in digests]


def kept(key: int, begin: int, count: int, density: float) -> Tensor:
    """A mask [count], bool, of the values from ``begin`` (a multiple of 8) on: each is True with probability density.

    Random numbers are those of a counter (Philox 4x64), so any part of a mask can be drawn alone.
    """
    source = np.random.Philox(key=key, counter=begin // _DRAWS_PER_COUNT)
    draws = source.random_raw((count + 1) // 2).view(np.uint32)[:count]
    return torch.from_numpy(draws < np.uint64(round(density * 2**32)))
