"""Which arithmetic each tensor of a merge gets.

A rule turns the aligned pieces of one tensor, one of each model (and of the base, last), into a piece of the result. A
method that has to know a whole tensor first (its angles, its largest values) makes passes over it before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import Tensor

from keye_train.merging.deltas import DeltaRule, mask_keys, trim_thresholds
from keye_train.merging.geometry import (
    block_products,
    slerp_coefficients,
    spherical_coefficients,
    stock_ratio,
    total_products,
)
from keye_train.merging.methods import combine
from keye_train.settings import MergeMethod, MergeSettings, SettingsError
from keye_train.settings.merging import TIES_DENSITY

AnyScan = Callable[[Callable[[Sequence[Tensor], int], Any]], Any]
"""``deltas.Scan`` of any result."""


class Rule(Protocol):
    """Merges aligned flat pieces that start at the value ``begin`` of a tensor into ``out``.

    Returns:
        Whether the values allow it: all inputs and results are finite; copies agree.
    """

    def __call__(self, pieces: Sequence[Tensor], begin: int, out: Tensor) -> bool:
        """Merge; see above."""


@dataclass(frozen=True)
class LinearRule:
    """sum_i w_i x_i, or with ``mean`` that sum divided by sum_i w_i; models of weight 0 only have to be finite."""

    weights: Sequence[float]
    mean: bool

    def __call__(self, pieces: Sequence[Tensor], begin: int, out: Tensor) -> bool:
        """As a ``Rule``."""
        return combine(out, pieces, self.weights, self.mean)


@dataclass(frozen=True)
class CopyRule:
    """The first model's values; with ``equal`` those of all others must be the same."""

    equal: bool

    def __call__(self, pieces: Sequence[Tensor], begin: int, out: Tensor) -> bool:
        """As a ``Rule``."""
        first = pieces[0]
        out.copy_(first)
        raw = first.view(torch.uint8)
        return not self.equal or all(torch.equal(raw, piece.view(torch.uint8)) for piece in pieces[1:])


def trajectory_weights(method: MergeMethod, count: int, decay: float | None) -> list[float]:
    """Weights of ``count`` checkpoints of one run, oldest first.

    wma: w_i = i, linearly rising; the mean trails the newest checkpoint by a third of the window, not by half.
    ema: the closed form of a_1 = theta_1, a_i = decay * a_(i-1) + (1 - decay) * theta_i (Tarvainen and Valpola 2017,
    "Mean teachers", equation 1). For a run whose learning rate still moves. LAWA (Kaddour 2022, "Stop wasting my
    time!") weighs all alike.
    """
    if method == MergeMethod.wma:
        return [float(i) for i in range(1, count + 1)]
    assert decay is not None, "the settings ask for a decay"
    return [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]


def model_weights(settings: MergeSettings) -> list[float]:
    """The weight of each model, before any normalisation; uniform, lawa, model_stock: all 1."""
    if settings.method in (MergeMethod.wma, MergeMethod.ema):
        return trajectory_weights(settings.method, len(settings.models), settings.decay)
    return list(settings.weights or [1.0] * len(settings.models))


def tensor_weights(settings: MergeSettings, name: str) -> list[float]:
    """The weight of each model in one tensor: that of the first pattern of ``modules`` that matches, or the model's."""
    for pattern, chosen in settings.modules.items():
        if fnmatchcase(name, pattern):
            return list(chosen)
    return model_weights(settings)


def check_patterns(settings: MergeSettings, names: Sequence[str]) -> None:
    """Raise SettingsError for a pattern of ``modules`` that no tensor has."""
    for pattern in settings.modules:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SettingsError(f"modules: {pattern} matches no tensor of the models: mend the pattern or drop it")


def rule_for(settings: MergeSettings, name: str, weights: Sequence[float], elements: int, scan: AnyScan) -> Rule:
    """The rule of one tensor.

    Args:
        settings: method and its values.
        name: of the tensor.
        weights: of the models that have the tensor, in their order.
        elements: of the tensor.
        scan: passes over its pieces, see ``deltas.Scan``.

    Raises:
        ValueError: its directions have no mean on the sphere.
    """
    method, count = settings.method, len(weights)
    if method == MergeMethod.task_arithmetic:
        return DeltaRule(weights)
    if method in (MergeMethod.ties, MergeMethod.dare_linear, MergeMethod.dare_ties):
        return _delta_rule(settings, name, weights, elements, scan)
    if elements and method in (MergeMethod.slerp, MergeMethod.spherical, MergeMethod.model_stock):
        if method == MergeMethod.model_stock:
            blocks = scan(lambda pieces, begin: block_products(pieces[:-1], pieces[-1]))
            ratio = stock_ratio(total_products([one for part in blocks for one in part]))
            return LinearRule([ratio / count] * count + [1 - ratio], mean=False)
        blocks = scan(lambda pieces, begin: block_products(pieces, None))
        products = total_products([one for part in blocks for one in part])
        if method == MergeMethod.spherical or count != 2:
            factors = spherical_coefficients(products, weights)
        else:
            length = (products[0][0] * products[1][1]) ** 0.5
            factors = list(slerp_coefficients(products[0][1] / length if length else 1.0, weights))
        if sum(factors) != 1 or 0 in factors:
            return LinearRule(factors, mean=False)
    if method == MergeMethod.model_stock:
        return LinearRule([1.0] * count + [0.0], mean=True)
    return LinearRule(weights, mean=True)


def _delta_rule(
    settings: MergeSettings, name: str, weights: Sequence[float], elements: int, scan: AnyScan
) -> DeltaRule:
    scale = 1.0 if settings.scale is None else settings.scale
    if settings.method == MergeMethod.ties:
        density = TIES_DENSITY if settings.density is None else settings.density
        trims = elements > 0 and density < 1
        thresholds = trim_thresholds(scan, len(weights), elements, density) if trims else None
        return DeltaRule(weights, elect=True, scale=scale, thresholds=thresholds)
    assert settings.density is not None, "the settings ask for a density"
    keys = mask_keys(scan, len(weights), name, settings.seed or 0)
    elect = settings.method == MergeMethod.dare_ties
    return DeltaRule(weights, elect=elect, scale=scale, keys=keys, density=settings.density)
