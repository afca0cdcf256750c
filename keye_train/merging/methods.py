"""The arithmetic of averaging: float64 sums in an order of their own, rounded once.

Uniform soup (Wortsman et al. 2022, "Model soups", section 2): theta = (1 / K) * sum_i theta_i.
Weighted: theta = sum_i w_i * theta_i / sum_i w_i.

Sums of bfloat16, float16 or float32 values are exact in float64 unless the values differ in size by more than
2^45 / K, 2^42 / K or 2^29 / K, so the result is in practice the true mean, correctly rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AVERAGED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Tensors of these types are averaged; all others (integers, booleans, float64) must be equal in all models."""


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None, dtype: torch.dtype) -> Tensor:
    """Average of ``tensors``, rounded once to ``dtype``.

    The result depends on the set of (tensor, weight) pairs alone, never on their order, and the average of a tensor
    with itself is that tensor, bit for bit (of the same dtype).

    Args:
        tensors: K tensors of one shape and one of ``AVERAGED_DTYPES``, contiguous, on the CPU.
        weights: K numbers >= 0 with a positive sum; None: all equal.
        dtype: one of ``AVERAGED_DTYPES``.

    Returns:
        A tensor of the same shape. It is not finite where an input is not, or where the mean does not fit ``dtype``.
    """
    if weights is None:
        weights = [1.0] * len(tensors)
    # Floating point addition is not associative. Summing in the order of the bytes makes the order in which the
    # models were named irrelevant, also where float64 has to round.
    ordered = sorted(zip(weights, tensors, strict=True), key=lambda pair: (pair[0], _bytes(pair[1])))
    (first_weight, first), *others = ordered
    # The sum starts with the first term, not with 0: 0 + (-0.0) would lose the sign of a zero.
    total = first.double() * first_weight
    for weight, tensor in others:
        total += tensor.double() * weight
    # Dividing the sum, instead of adding x_i * (w_i / sum w), keeps the mean of K equal values exact.
    return round_once(total / sum(weight for weight, _ in ordered), dtype)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to the nearest value of ``dtype``, ties to even, in one step.

    PyTorch converts float64 to bfloat16 and float16 by way of float32. That rounds twice, and a value a little above
    the middle of two neighbours can fall on the lower one. Rounding to float32 "to odd" first (Boldo and Melquiond
    2008, "Emulation of FMA and correctly rounded sums") keeps the second rounding right.

    Args:
        values: float64, any shape.
        dtype: float32, bfloat16 or float16.
    """
    nearest = values.float()
    if dtype == torch.float32:
        return nearest
    back = nearest.double()
    bits = nearest.view(torch.int32)
    # Sign and magnitude: one less in the bits is one step towards zero, whatever the sign.
    towards_zero = torch.where(back.abs() > values.abs(), bits - 1, bits)
    odd = torch.where(back != values, towards_zero | 1, bits)
    return odd.view(torch.float32).to(dtype)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
