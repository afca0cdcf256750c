"""Means that follow from lengths and angles: SLERP, the mean on the sphere, model stock.

Each is a linear combination of a tensor's K versions, whose factors depend on their inner products alone. So one pass
over a tensor gives a K x K matrix, everything else happens on that matrix, and a second pass forms the combination.
All sums over models are ``math.fsum``, which rounds once: naming the models in another order changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from keye_train.merging.methods import BLOCK

PARALLEL = 1e-8
"""1 - |cos| below which SLERP is the straight line: there they differ by less than float32 can hold."""

MOST_ROUNDS = 1000

Matrix = list[list[float]]


def block_products(tensors: Sequence[Tensor], base: Tensor | None) -> list[npt.NDArray[np.float64]]:
    """Inner products of each block of ``BLOCK`` values: [K, K] float64 for every block.

    Args:
        tensors: K flat tensors of one length.
        base: subtracted from each first; None: nothing is.
    """
    products = []
    for begin in range(0, tensors[0].numel(), BLOCK):
        rows = [tensor[begin : begin + BLOCK].double().numpy() for tensor in tensors]
        if base is not None:
            origin = base[begin : begin + BLOCK].double().numpy()
            rows = [row - origin for row in rows]
        matrix = np.zeros((len(rows), len(rows)))
        for i, left in enumerate(rows):
            for j in range(i + 1):
                # NumPy's sums run in one thread in a fixed order: the same bits for any number of threads.
                matrix[i, j] = matrix[j, i] = np.sum(left * rows[j])
        products.append(matrix)
    return products


def total_products(blocks: Sequence[npt.NDArray[np.float64]]) -> Matrix:
    """The sum of the blocks' matrices."""
    size = len(blocks[0])
    return [[math.fsum(block[i, j] for block in blocks) for j in range(size)] for i in range(size)]


def slerp_coefficients(cosine: float, weights: Sequence[float]) -> tuple[float, float]:
    """Factors of the two vectors of SLERP: sin((1 - t) Omega) / sin Omega and sin(t Omega) / sin Omega.

    Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; cos Omega = ``cosine`` is that of the two
    tensors as flat vectors, t = w_2 / (w_1 + w_2). Keeps the norm where a straight line between far models would
    shorten it. Vectors along one line have no arc of their own and get the straight line.
    """
    left, right = (weight / sum(weights) for weight in weights)
    if 1 - abs(cosine) < PARALLEL:
        return left, right
    angle = math.acos(cosine)
    return math.sin(left * angle) / math.sin(angle), math.sin(right * angle) / math.sin(angle)


def spherical_coefficients(products: Matrix, weights: Sequence[float]) -> list[float]:
    """Factors of the weighted mean of K tensors on the sphere.

    The direction is the point m of the unit sphere with sum_i w_i log_m(u_i) = 0, u_i = x_i / |x_i| (Buss and Fillmore
    2001, "Spherical averages and applications to spherical splines", algorithm A1: step along the mean of the
    logarithms until it vanishes); the length is the weighted mean of the norms. K = 2 gives the direction of SLERP. m
    stays in the span of the u_i, so its factors and ``products`` are all that the iteration needs; it ends when no
    factor changes by more than a few units of the last place. A tensor that is zero in one model has no direction, and
    gets the straight mean.

    Raises:
        ValueError: the directions point away from each other so far that no mean exists (no common hemisphere).
    """
    whole = math.fsum(weights)
    shares = [weight / whole for weight in weights]
    norms = [math.sqrt(products[i][i]) for i in range(len(shares))]
    if 0 in norms or sum(share > 0 for share in shares) == 1:
        return shares
    cosines = [
        [1.0 if i == j else products[i][j] / (norms[i] * norms[j]) for j in range(len(norms))]
        for i in range(len(norms))
    ]
    mean = _unit(shares, cosines)
    for _ in range(MOST_ROUNDS):
        step = _mean_logarithm(mean, cosines, shares)
        length = math.sqrt(max(_product(step, step, cosines), 0.0))
        along = math.sin(length) / length if length else 1.0
        moved = _unit([math.cos(length) * m + along * v for m, v in zip(mean, step, strict=True)], cosines)
        if max(abs(new - old) for new, old in zip(moved, mean, strict=True)) <= 4e-15:
            radius = math.fsum(share * norm for share, norm in zip(shares, norms, strict=True))
            return [radius * factor / norm for factor, norm in zip(moved, norms, strict=True)]
        mean = moved
    raise ValueError("the mean on the sphere was not found: these tensors point away from each other")


def _mean_logarithm(mean: Sequence[float], cosines: Matrix, shares: Sequence[float]) -> list[float]:
    """Factors of sum_i w_i log_m(u_i), log_m(u) = theta / sin(theta) * (u - cos(theta) m)."""
    pulls, shrink = [], []
    for row, share in zip(cosines, shares, strict=True):
        cosine = min(1.0, max(-1.0, math.fsum(factor * value for factor, value in zip(mean, row, strict=True))))
        if cosine <= -1 + 1e-12:
            raise ValueError("the mean on the sphere was not found: two tensors point in opposite directions")
        angle = math.acos(cosine)
        pull = share * (angle / math.sin(angle) if angle > 1e-9 else 1.0)
        pulls.append(pull)
        shrink.append(pull * cosine)
    back = math.fsum(shrink)
    return [pull - back * factor for pull, factor in zip(pulls, mean, strict=True)]


def _unit(factors: Sequence[float], cosines: Matrix) -> list[float]:
    square = _product(factors, factors, cosines)
    if square < 1e-24:
        raise ValueError("the mean on the sphere was not found: these tensors cancel each other")
    return [factor / math.sqrt(square) for factor in factors]


def _product(left: Sequence[float], right: Sequence[float], cosines: Matrix) -> float:
    return math.fsum(x * y * cosines[i][j] for i, x in enumerate(left) for j, y in enumerate(right) if x and y)


def stock_ratio(products: Matrix) -> float:
    """t of model stock: theta = t * mean_i(theta_i) + (1 - t) * base, for one tensor.

    Jang et al. 2024, "Model stock: all we need is just a few fine-tuned models", the ratio for N models:
    t = K cos / (1 + (K - 1) cos), with the mean cosine between the K deltas to the base. Deltas at right angles hold
    noise alone (t = 0: the base), equal ones nothing but signal (t = 1: the mean). A negative cosine counts as 0, and
    a delta of zeros has none with any other; where all are zero the mean is the base anyway. One model has no other to
    agree with, and the paper's ratio starts at two: t = 1, the model itself.

    Args:
        products: inner products of the deltas.
    """
    count = len(products)
    norms = [math.sqrt(products[i][i]) for i in range(count)]
    if count == 1 or not any(norms):
        return 1.0
    cosines = [
        products[i][j] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for i in range(count) for j in range(i)
    ]
    cosine = min(1.0, max(0.0, math.fsum(cosines) / len(cosines)))
    return count * cosine / (1 + (count - 1) * cosine)
