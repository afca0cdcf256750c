"""Which arithmetic each tensor of a merge gets.

A rule turns the aligned pieces of one tensor, one of each model (and of the base, last), into a piece of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from keye_train.merging.methods import average, round_once
from keye_train.merging.streaming import ExportReader
from keye_train.settings import MergeMethod, MergeSettings, SettingsError

Rule = Callable[[Sequence[Tensor], torch.dtype], Tensor]

PARALLEL = 1e-8
"""1 - |cos| below which SLERP is the straight line: there they differ by less than float32 can hold."""


def trajectory_weights(method: MergeMethod, count: int, decay: float | None) -> list[float]:
    """Weights of ``count`` checkpoints of one run, oldest first.

    wma: w_i = i, linearly rising; the mean trails the newest checkpoint by a third of the window, not by half.
    ema: the closed form of a_1 = theta_1, a_i = decay * a_(i-1) + (1 - decay) * theta_i (Tarvainen and Valpola 2017,
    "Mean teachers", equation 1). For a run whose learning rate still moves. LAWA (Kaddour 2022, "Stop wasting my
    time!") is the uniform mean of the last K checkpoints: method=uniform with these K models.
    """
    if method == MergeMethod.wma:
        return [float(i) for i in range(1, count + 1)]
    assert decay is not None, "the settings ask for a decay"
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def model_weights(settings: MergeSettings) -> list[float]:
    """The weight of each model, before any normalisation; uniform: all 1."""
    if settings.method in (MergeMethod.wma, MergeMethod.ema):
        return trajectory_weights(settings.method, len(settings.models), settings.decay)
    return list(settings.weights or [1.0] * len(settings.models))


def task_arithmetic(tensors: Sequence[Tensor], base: Tensor, weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    """theta = base + sum_i w_i * (theta_i - base), in float64, rounded once.

    Ilharco et al. 2023, "Editing models with task arithmetic", section 2. To add what several fine-tunings of one
    base learned, or, with a negative weight, to take something away. Terms are added in an order of their own, so the
    order of the models does not matter; models equal to the base give the base, bit for bit.

    Args:
        tensors: K tensors of one shape, on the CPU.
        base: their common parent, of the same shape.
        weights: K finite numbers.
        dtype: float32, bfloat16 or float16.
    """
    origin = base.double()
    pairs = sorted(
        zip(weights, tensors, strict=True), key=lambda pair: (pair[0], pair[1].view(torch.uint8).numpy().tobytes())
    )
    delta = torch.zeros_like(origin)
    for weight, tensor in pairs:
        delta += weight * (tensor.double() - origin)
    # base + 0 would lose the sign of a zero.
    return round_once(torch.where(delta == 0, origin, origin + delta), dtype)


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


def check_patterns(settings: MergeSettings, names: Sequence[str]) -> None:
    """Raise SettingsError for a pattern of ``modules`` that no tensor has."""
    for pattern in settings.modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(f"modules: {pattern} matches no tensor of the models: mend the pattern or drop it")


def rule_for(settings: MergeSettings, readers: Sequence[ExportReader], name: str) -> Rule:
    """The rule of one tensor; SLERP reads the tensor once for it."""
    weights = model_weights(settings)
    if settings.method == MergeMethod.task_arithmetic:
        return lambda pieces, dtype: task_arithmetic(pieces[:-1], pieces[-1], weights, dtype)
    if settings.method == MergeMethod.slerp:
        factors = slerp_coefficients(_cosine(readers, name), weights)
        if sum(factors) != 1 or 0 in factors:
            return lambda pieces, dtype: _linear(pieces, factors, dtype)
    for pattern, chosen in settings.modules.items():
        if fnmatchcase(name, pattern):
            weights = chosen
            break
    return lambda pieces, dtype: _average_of_parts(pieces, weights, dtype)


def _average_of_parts(pieces: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype) -> Tensor:
    # A model of weight 0 takes no part: adding 0 * x would turn -0.0 into 0.0. Broken values are still an error.
    if not all(torch.isfinite(piece).all() for piece, weight in zip(pieces, weights, strict=True) if not weight):
        return torch.full_like(pieces[0], torch.nan, dtype=dtype)
    parts = [(piece, weight) for piece, weight in zip(pieces, weights, strict=True) if weight]
    return average([piece for piece, _ in parts], [weight for _, weight in parts], dtype)


def _linear(pieces: Sequence[Tensor], factors: Sequence[float], dtype: torch.dtype) -> Tensor:
    if not all(torch.isfinite(piece).all() for piece in pieces):
        return torch.full_like(pieces[0], torch.nan, dtype=dtype)
    terms = [piece.double() * factor for piece, factor in zip(pieces, factors, strict=True) if factor]
    return round_once(terms[0] if len(terms) == 1 else terms[0] + terms[1], dtype)


def _cosine(readers: Sequence[ExportReader], name: str) -> float:
    """Cosine of the two models' tensors as flat vectors, in float64; 1 where one is all zeros (no direction)."""
    dot, left_square, right_square = 0.0, 0.0, 0.0
    for left, right in zip(*(reader.pieces(name) for reader in readers), strict=True):
        x, y = left.double().numpy(), right.double().numpy()
        # NumPy's sums run in one thread in a fixed order: the same bits for any number of threads.
        dot += float(np.sum(x * y))
        left_square += float(np.sum(x * x))
        right_square += float(np.sum(y * y))
    norms = math.sqrt(left_square) * math.sqrt(right_square)
    return dot / norms if norms else 1.0
