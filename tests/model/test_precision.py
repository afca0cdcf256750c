"""Promise: in bfloat16 runs angles, rotations of the tower, norms, softmax and loss are computed in float32."""

from __future__ import annotations

import math

import golden
import pytest
import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from keye_train.model import KeyeConfig
from keye_train.model.attention import Segments, packed_attention
from keye_train.model.language import mrope_tables
from keye_train.model.loss import LMHead
from keye_train.model.vision import PositionTable, rotary_tables, rotate

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("autocast", [False, True])
def test_angles_of_far_positions(autocast: bool) -> None:
    """bfloat16 knows no whole number between 256 and 258: positions must not pass through it."""
    config = KeyeConfig(**golden.table("tiny_config.json"))
    positions = torch.arange(100_000, 100_064).expand(3, 1, -1)
    exact = [table.to(BF16) for table in mrope_tables(positions.double(), config, torch.float64)]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        rounded = mrope_tables(positions, config, BF16)
        row = positions[0, 0]
        tower = rotary_tables(row, row, 72)
    for measured, expected in zip(rounded, exact, strict=True):
        # float32 angles near 1e5 are good to 0.004; those of bfloat16 would be wrong by hundreds of turns.
        assert (measured.float() - expected.float()).abs().max() < 0.02
    assert all(table.dtype == torch.float32 for table in tower)


def test_the_tower_rotates_in_float32() -> None:
    states, places = torch.randn(16, 2, 72, dtype=BF16), torch.arange(16)
    tables = rotary_tables(places, places, 72)
    assert torch.equal(rotate(states, tables), rotate(states.float(), tables).to(BF16))


def test_the_position_table_is_mixed_in_float32() -> None:
    table = PositionTable(9, 8).to(BF16)
    rows, weights = torch.randint(9, (5, 4)), torch.full((5, 4), 0.25)
    exact = (table.weight.double()[rows] * 0.25).sum(dim=1)
    assert torch.equal(table(rows, weights), exact.to(BF16))


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(4096, eps=1e-6), lambda: Qwen3RMSNorm(4096, eps=1e-6)])
def test_norms(make: object) -> None:
    """Sums of 4,096 squares, which bfloat16 cannot add up: it stops growing at 256 times the summand."""
    norm = make().to(BF16)  # type: ignore[operator]
    states = (torch.randn(4, 4096) * 3 + 1).to(BF16)
    exact = make()(states.float())  # type: ignore[operator]
    assert ((norm(states).float() - exact).abs() <= 0.01 * exact.abs() + 1e-3).all()


def test_softmax() -> None:
    """4,096 equal weights sum to 1, whatever bfloat16 would make of their sum."""
    tokens = 4096
    key, value = torch.zeros(tokens, 1, 16, dtype=BF16), torch.ones(tokens, 1, 16, dtype=BF16)
    whole = Segments(torch.tensor([0, tokens], dtype=torch.int32), tokens)
    one = Segments(torch.tensor([0, 1], dtype=torch.int32), 1)
    output = packed_attention(torch.randn(1, 1, 16, dtype=BF16), key, value, one, whole)
    assert (output.float() - 1).abs().max() < 0.005


@pytest.mark.parametrize("autocast", [False, True])
def test_loss(autocast: bool) -> None:
    """The logarithm of 4,096 equal terms, to more digits than bfloat16 has."""
    head = LMHead(16, 4096).to(torch.float32 if autocast else BF16)
    hidden = torch.zeros(3, 16, dtype=head.weight.dtype)
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        losses = head(hidden, torch.tensor([0, 7, 4095]))
    assert losses.dtype == torch.float32
    assert (losses - math.log(4096)).abs().max() < 1e-5
