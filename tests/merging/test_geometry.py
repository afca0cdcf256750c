"""Means on the sphere and model stock: end points, symmetry, and the equations that define them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_train.merging.geometry import (
    block_products,
    slerp_coefficients,
    spherical_coefficients,
    stock_ratio,
    total_products,
)


def products_of(rows: torch.Tensor) -> list[list[float]]:
    return total_products(block_products(list(rows), None))


def near(seed: int, count: int, spread: float) -> torch.Tensor:
    """[count, 40] float64: directions about a common one, with norms of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, 40, generator=generator) + spread * torch.randn(count, 40, generator=generator)
    return (rows * (1 + torch.rand(count, 1, generator=generator))).double()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.integers(2, 6), st.floats(0.001, 0.7), st.data())
def test_the_spherical_mean_is_where_the_logarithms_cancel(
    seed: int, count: int, spread: float, data: st.DataObject
) -> None:
    rows = near(seed, count, spread)
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=count, max_size=count))
    factors = spherical_coefficients(products_of(rows), weights)
    mean = (torch.tensor(factors, dtype=torch.float64)[:, None] * rows).sum(0)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    norms = rows.norm(dim=1)
    assert mean.norm().item() == pytest.approx((shares * norms).sum().item(), rel=1e-12)
    m, units = mean / mean.norm(), rows / norms[:, None]
    away = units - (units @ m)[:, None] * m
    angles = torch.atan2(away.norm(dim=1), units @ m)
    logarithms = angles[:, None] * away / away.norm(dim=1, keepdim=True).clamp(min=1e-300)
    assert (shares[:, None] * logarithms).sum(0).norm().item() < 1e-12
    order = data.draw(st.permutations(range(count)))
    shuffled = spherical_coefficients(products_of(rows[order]), [weights[i] for i in order])
    assert shuffled == [factors[i] for i in order]


def test_two_models_have_the_direction_of_slerp() -> None:
    rows = near(1, 2, 0.5)
    rows /= rows.norm(dim=1, keepdim=True)
    cosine = float(rows[0] @ rows[1])
    found = spherical_coefficients(products_of(rows), [1.0, 3.0])
    assert found == pytest.approx(slerp_coefficients(cosine, [1.0, 3.0]), rel=1e-12)
    assert spherical_coefficients(products_of(rows), [0.0, 2.0]) == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"opposite directions|cancel each other"):
        spherical_coefficients([[1.0, -1.0], [-1.0, 1.0]], [1.0, 2.0])


def test_model_stock_ratio() -> None:
    """With K = 2: t = 2 cos / (1 + cos); two deltas at 60 degrees: 2/3."""
    turned = [[1.0, 0.0], [math.cos(math.pi / 3), math.sin(math.pi / 3)]]
    assert stock_ratio(products_of(torch.tensor(turned, dtype=torch.float64))) == pytest.approx(2 / 3)
    assert stock_ratio(products_of(torch.eye(3, dtype=torch.float64))) == 0.0
    assert stock_ratio([[4.0, 4.0], [4.0, 4.0]]) == 1.0
    assert stock_ratio([[0.0, 0.0], [0.0, 0.0]]) == 1.0
    assert stock_ratio([[1.0, -0.5], [-0.5, 1.0]]) == 0.0
