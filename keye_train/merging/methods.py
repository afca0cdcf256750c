"""The arithmetic of averaging: float64 sums that no order of the models changes, rounded once.

Uniform soup (Wortsman et al. 2022, "Model soups", section 2): theta = (1 / K) * sum_i theta_i.
Weighted: theta = sum_i w_i * theta_i / sum_i w_i.

A sum of K bfloat16, float16 or float32 values is exact in float64 unless they differ in size by more than 2^44 / K,
2^41 / K or 2^28 / K; ``scan_values`` proves it for a block of values from their largest and smallest exponent. Where
the proof fails, values are added in the order of their size. So models of equal weight may come in any order, and the
mean is in practice the true one, correctly rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keye_train.merging.buffers import Buffers

AVERAGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Tensors of these types are averaged; all others (integers, booleans, float64) must be equal in all models."""

BLOCK = 1 << 17
"""Values handled at a time: small enough for the caches. Sums over a tensor are sums over its blocks, whatever the
size of the pieces in which it is read."""

STRIDE = 2 * BLOCK
"""Values of one operation, where those of a result do not depend on each other: threads hand the interpreter to each
other at every operation, and shorter ones wait for it longer than they take."""

SORTED = 1 << 15
"""Values of each model that are sorted at a time: the one step whose memory grows with the number of models."""

_SCRATCH = Buffers()
_TOTAL, _PART, _CONVERTED, _MAGNITUDE = range(4)  # its slots

_BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.float32: (torch.int32, np.uint32),
    torch.bfloat16: (torch.int16, np.uint16),
    torch.float16: (torch.int16, np.uint16),
}
_FRACTION_BITS: dict[torch.dtype, Any] = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
_BIAS = {torch.float32: 127, torch.bfloat16: 127, torch.float16: 15}
_FLOAT64_BITS = 53
_MIDDLE = np.uint32(0x8000)  # the lower half of a float32 in the middle of two bfloat16 values


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """Average of ``tensors``, rounded once to ``dtype``.

    The result depends on the set of (tensor, weight) pairs alone, never on their order, and the average of a tensor
    with itself is that tensor, bit for bit (of the same dtype).

    Args:
        tensors: K tensors of one shape, each of one of ``AVERAGED_DTYPES``, contiguous, on the CPU.
        weights: K numbers with a positive sum; None: all equal.
        dtype: one of ``AVERAGED_DTYPES``.

    Returns:
        A tensor of the same shape. It is not finite where an input is not, or where the mean does not fit ``dtype``.
    """
    weights = [1.0] * len(tensors) if weights is None else weights
    out = torch.empty(tensors[0].shape, dtype=dtype)
    combine(out.view(-1), [tensor.view(-1) for tensor in tensors], weights, mean=True)
    return out


def combine(out: Tensor, values: Sequence[Tensor], weights: Sequence[float], mean: bool) -> bool:
    """Write sum_i w_i x_i, with ``mean`` divided by sum_i w_i, into ``out``, rounded once to its type.

    Dividing the sum, instead of adding x_i * (w_i / sum w), keeps the mean of K equal values exact.

    Args:
        out: [N] of one of ``AVERAGED_DTYPES``.
        values: K tensors [N] of ``AVERAGED_DTYPES``, contiguous, on the CPU. Those of weight 0 only have to be finite.
        weights: K numbers, not all 0.
        mean: their sum is then not 0.

    Returns:
        Whether all values are finite, and the result.
    """
    # Adding 0 * x would turn -0.0 into 0.0.
    used = [i for i, weight in enumerate(weights) if weight]
    shares = [weights[i] for i in used]
    whole = sum(sorted(shares)) if mean else 1.0
    all_are_finite = True
    for begin in range(0, out.numel(), STRIDE):
        parts = [value[begin : begin + STRIDE] for value in values]
        finite, exact = scan_values(parts)
        all_are_finite &= finite
        total = _SCRATCH.take(_TOTAL, parts[0].numel(), torch.float64)
        weighted_sum([parts[i] for i in used], shares, exact, total)
        if whole != 1:
            total.div_(whole)
        rounded = out[begin : begin + STRIDE]
        rounded.copy_(total if out.dtype == torch.float32 else round_once(total, out.dtype))
    return all_are_finite and all_finite(out)


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float], exact: bool, into: Tensor | None = None) -> Tensor:
    """sum_i w_i * x_i in float64, the same for every order of the pairs.

    Values of one weight are added first, weights ascend. Sums that float64 has to round are taken in the order of the
    values' size, element by element.

    Args:
        values: K tensors [N] of any type.
        weights: K finite numbers.
        exact: sums of the values are exact in float64 (``scan_values``).
        into: [N] float64, for the sum; None: memory of its own.
    """
    groups: dict[float, list[Tensor]] = {}
    for value, weight in zip(values, weights, strict=True):
        groups.setdefault(weight, []).append(value)
    total = torch.empty(values[0].shape, dtype=torch.float64) if into is None else into
    # The sum starts with the first term, not with 0: 0 + (-0.0) would lose the sign of a zero.
    for number, weight in enumerate(sorted(groups)):
        part = _SCRATCH.take(_PART, total.numel(), torch.float64) if number else total
        _plain_sum(groups[weight], exact, part)
        if weight != 1:
            part.mul_(weight)
        if number:
            total.add_(part)
    return total


def _plain_sum(values: Sequence[Tensor], exact: bool, into: Tensor) -> None:
    if not exact and len(values) > 2:  # the sum of two does not depend on their order
        for begin in range(0, into.numel(), SORTED):
            doubles = torch.stack([value[begin : begin + SORTED].double() for value in values])
            _plain_sum(list(torch.sort(doubles, dim=0).values), True, into[begin : begin + SORTED])
        return
    into.copy_(values[0])
    for value in values[1:]:
        if value.dtype != torch.float64:
            # Converted first: torch adds unlike types at half the speed.
            value = _SCRATCH.take(_CONVERTED, into.numel(), torch.float64).copy_(value)
        into.add_(value)


def scan_values(tensors: Sequence[Tensor], terms: int | None = None) -> tuple[bool, bool]:
    """Whether all values are finite, and whether float64 holds every sum of ``terms`` of these values exactly.

    Floating point values are whole multiples of the last bit of the smallest among them; sums stay exact as long as
    ``terms`` times the largest needs at most 53 of these bits.

    Args:
        tensors: K tensors [N] of ``AVERAGED_DTYPES``, contiguous, on the CPU.
        terms: None: K, one value of each.
    """
    terms = len(tensors) if terms is None else terms
    highest, lowest = -(1 << 30), 1 << 30  # exponents: above every value, of the last bit of every value
    for tensor in tensors:
        if not tensor.numel():
            continue
        signed, unsigned = _BITS[tensor.dtype]
        fraction, bias = _FRACTION_BITS[tensor.dtype], _BIAS[tensor.dtype]
        magnitude = _SCRATCH.take(_MAGNITUDE, tensor.numel(), signed)
        torch.bitwise_and(tensor.view(signed), torch.iinfo(signed).max, out=magnitude)
        smallest, largest = (int(one) for one in torch.aminmax(magnitude))
        if largest >> fraction == (1 << (8 * signed.itemsize - 1 - fraction)) - 1:  # the exponent of inf and NaN
            return False, False
        if largest == 0:
            continue
        if smallest == 0:
            # A zero becomes the largest number, so it does not count.
            smallest = int(magnitude.sub_(1).numpy().view(unsigned).min()) + 1
        highest = max(highest, max(largest >> fraction, 1) - bias + 1)
        lowest = min(lowest, max(smallest >> fraction, 1) - bias - fraction)
    return True, highest - lowest + (terms - 1).bit_length() <= _FLOAT64_BITS


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; of a contiguous tensor of ``AVERAGED_DTYPES`` on the CPU."""
    # Such a value makes the sum such a value. So does a sum that float32 cannot hold: then the values are looked at.
    return math.isfinite(tensor.sum(dtype=torch.float32).item()) or scan_values([tensor.view(-1)])[0]


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest value of ``dtype``, ties to even, in one step.

    PyTorch converts float64 to bfloat16 and float16 by way of float32. That rounds twice, and a value a little above
    the middle of two neighbours can fall on the lower one. Rounding to float32 "to odd" first (Boldo and Melquiond
    2008, "Emulation of FMA and correctly rounded sums") keeps the second rounding right. For bfloat16 this is done for
    the few values alone whose float32 is the middle of two neighbours: elsewhere both ways agree.

    Args:
        values: float64, any shape.
        dtype: float32, bfloat16 or float16.
    """
    nearest = values.float()
    if dtype == torch.float32:
        return nearest
    if dtype == torch.float16:
        return _to_odd(values, nearest).to(dtype)
    rounded = nearest.to(dtype)
    low = np.bitwise_and(nearest.view(-1).view(torch.int32).numpy().view(np.uint32), np.uint32(0xFFFF))
    middles = np.flatnonzero(low == _MIDDLE)
    if middles.size:
        where = torch.from_numpy(middles)
        rounded.view(-1)[where] = _to_odd(values.reshape(-1)[where], nearest.view(-1)[where]).to(dtype)
    return rounded


def _to_odd(values: Tensor, nearest: Tensor) -> Tensor:
    """float64 to float32, inexact values to the neighbour with an odd last bit; ``nearest`` are the values rounded."""
    back = nearest.double()
    bits = nearest.view(torch.int32)
    # Sign and magnitude: one less in the bits is one step towards zero, whatever the sign.
    towards_zero = torch.where(back.abs() > values.abs(), bits - 1, bits)
    return torch.where(back != values, towards_zero | 1, bits).view(torch.float32)
