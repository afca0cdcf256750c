"""TIES and DARE against cases worked by hand and against their formulas, written plainly on whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from keye_train.merging import deltas
from keye_train.merging.deltas import DeltaRule, kept, mask_keys, trim_thresholds
from keye_train.merging.methods import round_once


def scan_of(tensors: Sequence[Tensor], step: int) -> Callable[[Callable[[Sequence[Tensor], int], Any]], Iterator[Any]]:
    """Passes over tensors in pieces of ``step`` values."""

    def scan(look: Callable[[Sequence[Tensor], int], Any]) -> Iterator[Any]:
        for begin in range(0, tensors[0].numel(), step):
            yield look([tensor[begin : begin + step] for tensor in tensors], begin)

    return scan


def merged(rule: DeltaRule, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(tensors[0].shape, dtype=dtype)
    assert rule(tensors, 0, out)
    return out


def drawn(seed: int, count: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator).to(dtype) for _ in range(count)]


def test_ties_by_hand() -> None:
    """Three deltas of five values, density 0.4: the two largest of each stay."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    moved = [[4.0, -1.0, 0.5, 0.0, 3.0], [2.0, 2.0, -0.5, 0.0, -0.25], [-6.0, 0.0, 0.5, 0.0, 0.125]]
    tensors = [base + torch.tensor(delta) for delta in moved]
    thresholds = trim_thresholds(scan_of([*tensors, base], 2), 3, 5, 0.4)
    assert thresholds == [3.0, 2.0, 0.5]
    # Trimmed: [4, 0, 0, 0, 3], [2, 2, 0, 0, 0], [-6, 0, .5, 0, 0]. Sums: 0, 2, .5, 0, 3; no sign is elected where 0.
    rule = DeltaRule([1.0, 1.0, 1.0], elect=True, thresholds=thresholds)
    assert merged(rule, [*tensors, base]).tolist() == [1.0, 3.0, 1.5, 1.0, 4.0]
    # Weights 2, 1, 1: the first value sums to 2 * 4 + 2 - 6 = 4 > 0; mean (2 * 4 + 1 * 2) / 3.
    rule = DeltaRule([2.0, 1.0, 1.0], elect=True, thresholds=thresholds, scale=0.5)
    assert merged(rule, [*tensors, base]).tolist() == pytest.approx([1 + 0.5 * 10 / 3, 2.0, 1.25, 1.0, 2.5])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 999), st.integers(2, 5), st.integers(1, 60), st.floats(0.02, 1.0), st.data())
def test_ties_is_the_published_algorithm(
    seed: int, count: int, length: int, density: float, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    *tensors, base = drawn(seed, count + 1, length, dtype)
    weights = data.draw(st.lists(st.floats(0.1, 4), min_size=count, max_size=count))
    thresholds = trim_thresholds(scan_of([*tensors, base], 16), count, length, density)
    rule = DeltaRule(weights, elect=True, scale=0.7, thresholds=thresholds)
    # Algorithm 1, on whole tensors in float64.
    tau = torch.stack([tensor.double() - base.double() for tensor in tensors])
    keep = max(1, int(density * length))
    smallest = tau.float().abs().topk(keep, dim=1).values[:, -1:]
    trimmed = torch.where(tau.float().abs() >= smallest, tau, 0.0)
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = torch.sign((w * trimmed).sum(0))
    agree = (torch.sign(trimmed) == elected) & (elected != 0)
    mean = (w * trimmed * agree).sum(0) / (w * agree).sum(0).clamp(min=1e-300)
    # Float64 in another order may come to the other side of the middle between two values.
    expected = base.double() + 0.7 * mean
    below, above = (round_once(expected + error, dtype) for error in (-1e-12, 1e-12))
    found = merged(rule, [*tensors, base], dtype)
    assert ((below <= found) & (found <= above)).all()
    order = data.draw(st.permutations(range(count)))
    rule = DeltaRule([weights[i] for i in order], True, 0.7, [thresholds[i] for i in order])
    shuffled = merged(rule, [*(tensors[i] for i in order), base], dtype)
    assert torch.equal(shuffled.view(torch.uint8), merged_bits(weights, thresholds, [*tensors, base], dtype))


def merged_bits(weights: list[float], thresholds: list[float], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return merged(DeltaRule(weights, True, 0.7, thresholds), tensors, dtype).view(torch.uint8)


@pytest.mark.parametrize("elect", [False, True])
def test_dare_is_its_formula(elect: bool) -> None:
    *tensors, base = drawn(5, 4, 1000)
    keys = mask_keys(scan_of([*tensors, base], 256), 3, "w", seed=3)
    weights = [0.5, 0.25, 1.0]
    rule = DeltaRule(weights, elect=elect, keys=keys, density=0.25)
    masked = torch.stack(
        [
            kept(key, 0, 1000, 0.25) * (tensor.double() - base.double()) / 0.25
            for key, tensor in zip(keys, tensors, strict=True)
        ]
    )
    w = torch.tensor(weights, dtype=torch.float64)[:, None]
    delta = (w * masked).sum(0)
    if elect:
        agree = (torch.sign(masked) == torch.sign(delta)) & (delta != 0)
        delta = (w * masked * agree).sum(0) / (w * agree).sum(0).clamp(min=1e-300)
    torch.testing.assert_close(merged(rule, [*tensors, base]), (base.double() + delta).float(), rtol=1e-6, atol=1e-6)


def test_masks_follow_the_values_and_no_border() -> None:
    mask = kept(17, 0, 100_000, 0.3)
    assert mask.double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(mask[4096:4196], kept(17, 4096, 100, 0.3))
    assert kept(17, 0, 100, 1.0).all()
    tensors = drawn(0, 3, 5000)
    a, b = (mask_keys(scan_of(tensors, deltas.BLOCK), 2, name, seed) for name, seed in (("w", 0), ("w", 1)))
    assert len({*a, *b, *mask_keys(scan_of(tensors, deltas.BLOCK), 2, "v", 0)}) == 6
    swapped = mask_keys(scan_of([tensors[1], tensors[0], tensors[2]], deltas.BLOCK), 2, "w", 0)
    assert swapped == a[::-1]
