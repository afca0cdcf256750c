"""The average is the true mean, rounded once, whatever the order and the type."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye_train.merging import methods
from keye_train.merging.methods import AVERAGED_DTYPES, average, round_once

dtypes = st.sampled_from(AVERAGED_DTYPES)


@st.composite
def siblings(draw: st.DrawFn, wide: bool = True) -> list[Tensor]:
    """2 to 5 tensors of one dtype: any finite bit patterns, or (wide=False) values of the size of weights."""
    dtype = draw(dtypes)
    limit = float(torch.finfo(dtype).max) if wide else 8.0
    count, length = draw(st.integers(2, 5)), draw(st.integers(1, 6))
    numbers = st.floats(-limit, limit, width=64)
    if not wide:
        numbers = numbers.map(lambda x: round(x * 2**12) / 2**12)
    values = draw(st.lists(numbers, min_size=count * length, max_size=count * length))
    stacked = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(count, length)
    return list(torch.nan_to_num(stacked, posinf=limit, neginf=-limit))


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def nearest(value: Fraction, dtype: torch.dtype) -> Tensor:
    """``value`` rounded to the nearest of ``dtype``, ties to even: by exact search among the neighbours."""
    guess = torch.tensor([float(value)], dtype=torch.float64).to(dtype)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    bits = int(guess.view(width))
    candidates = [torch.tensor([bits + step], dtype=width).view(dtype) for step in (-1, 0, 1)]
    zero = torch.zeros(1, dtype=dtype)
    candidates = [c for c in [*candidates, zero] if torch.isfinite(c).all()]
    return min(candidates, key=lambda c: (abs(Fraction(float(c)) - value), int(c.view(width)) & 1))


@settings(max_examples=100, deadline=None)
@given(siblings(), st.data())
def test_order_does_not_matter(tensors: list[Tensor], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(tensors), max_size=len(tensors)))
    order = data.draw(st.permutations(range(len(tensors))))
    dtype = tensors[0].dtype
    shuffled = [tensors[i] for i in order]
    assert same_bits(average(tensors, None, dtype), average(shuffled, None, dtype))
    assert same_bits(average(tensors, weights, dtype), average(shuffled, [weights[i] for i in order], dtype))


@pytest.mark.parametrize("weights", [None, [2.0, 1.0, 2.0, 1.0, 2.0]])
def test_neither_strides_nor_what_is_sorted_at_a_time_change_a_bit(
    weights: list[float] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-30, 30, (5, 1000), generator=draw)  # float64 does not hold their sums
    tensors = list(torch.randn(5, 1000, generator=draw) * sizes)
    whole = average(tensors, weights, torch.float32)
    monkeypatch.setattr(methods, "STRIDE", 48)
    monkeypatch.setattr(methods, "SORTED", 7)
    assert same_bits(average(tensors, weights, torch.float32), whole)


@settings(max_examples=100, deadline=None)
@given(siblings(), st.integers(2, 7), st.data())
def test_average_with_itself_is_identity(tensors: list[Tensor], copies: int, data: st.DataObject) -> None:
    tensor = torch.cat([tensors[0], torch.tensor([-0.0, 0.0], dtype=tensors[0].dtype)])
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=copies, max_size=copies))
    assert same_bits(average([tensor] * copies, None, tensor.dtype), tensor)
    assert same_bits(average([tensor] * copies, weights, tensor.dtype), tensor)


@settings(max_examples=150, deadline=None)
@given(siblings(wide=False), dtypes)
def test_result_is_the_true_mean_rounded_once(tensors: list[Tensor], dtype: torch.dtype) -> None:
    merged = average(tensors, None, dtype)
    for i in range(len(merged)):
        mean = sum((Fraction(float(tensor[i])) for tensor in tensors), Fraction()) / len(tensors)
        assert float(merged[i]) == float(nearest(mean, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_double_rounding(dtype: torch.dtype) -> None:
    """One step of float64 above the middle of two neighbours: float32 would round it onto the middle."""
    step = torch.finfo(dtype).eps
    value = torch.tensor([np.nextafter(1 + step / 2, 2), np.nextafter(-1 - step / 2, -2)])
    assert value.float().to(dtype).abs().tolist() == [1.0, 1.0], "the trap is gone: PyTorch rounds once by itself"
    assert round_once(value, dtype).abs().tolist() == [1 + step, 1 + step]


def test_weights_are_shares() -> None:
    tensors = [torch.tensor([0.0, 4.0]), torch.tensor([8.0, 4.0])]
    assert average(tensors, [3.0, 1.0], torch.float32).tolist() == [2.0, 4.0]
    assert average(tensors, [0.0, 2.0], torch.float32).tolist() == [8.0, 4.0]
    assert average(tensors, [6.0, 2.0], torch.float32).tolist() == average(tensors, [3.0, 1.0], torch.float32).tolist()
