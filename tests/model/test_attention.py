"""Promise: attention stays within its segments, on every back end; the tower never waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keye_train.model.attention import Segments, packed_attention
from keye_train.model.configuration import KeyeVisionConfig
from keye_train.model.vision import PatchLayout, VisionEmbeddings, rotary_tables

LENGTHS = [5, 5, 1, 7, 2, 2]


def segments(lengths: list[int]) -> Segments:
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return Segments(borders.int(), max(lengths))


def dense(query: Tensor, key: Tensor, value: Tensor, lengths: list[list[int]], causal: bool) -> Tensor:
    """One softmax over everything, with a mask that shuts out the other segments."""
    owner_q, owner_k = (torch.repeat_interleave(torch.arange(len(part)), torch.tensor(part)) for part in lengths)
    allowed = owner_q[:, None] == owner_k
    if causal:
        allowed = allowed.tril()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def states(tokens: int, heads: int, **options: object) -> Tensor:
    return torch.randn(tokens, heads, 16, **options)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_equal_to_a_block_diagonal_mask(causal: bool, groups: int) -> None:
    torch.manual_seed(0)
    inputs = [states(sum(LENGTHS), heads).requires_grad_() for heads in (4, groups, groups)]
    packed = packed_attention(*inputs, segments(LENGTHS), causal=causal)
    expected = dense(*inputs, [LENGTHS, LENGTHS], causal)
    assert torch.allclose(packed, expected, atol=1e-6)
    slopes = torch.randn_like(packed)
    for measured, wanted in zip(
        torch.autograd.grad(packed, inputs, slopes), torch.autograd.grad(expected, inputs, slopes), strict=True
    ):
        assert torch.allclose(measured, wanted, atol=1e-5)


def test_queries_may_have_segments_of_their_own() -> None:
    ones = [1] * len(LENGTHS)
    query, key, value = states(len(LENGTHS), 4), states(sum(LENGTHS), 4), states(sum(LENGTHS), 4)
    packed = packed_attention(query, key, value, segments(ones), segments(LENGTHS))
    assert torch.allclose(packed, dense(query, key, value, [ones, LENGTHS], False), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(8, 2, 128), (4, 4, 72)])
def test_fused_kernel_equals_float32(causal: bool, heads: int, groups: int, head_dim: int) -> None:
    lengths = [300, 17, 1, 512]
    borders = segments(lengths)
    borders = Segments(borders.cu_seqlens.cuda(), borders.max_seqlen)
    inputs = [
        torch.randn(sum(lengths), count, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for count in (heads, groups, groups)
    ]
    fused = packed_attention(*inputs, borders, causal=causal)
    exact = packed_attention(*(part.float() for part in inputs), borders, causal=causal)
    assert (fused.float() - exact).abs().max().item() < 0.03
    slopes = torch.randn_like(exact)
    for measured, wanted in zip(
        torch.autograd.grad(fused, inputs, slopes.bfloat16()), torch.autograd.grad(exact, inputs, slopes), strict=True
    ):
        assert (measured - wanted).float().norm() < 0.02 * wanted.float().norm()


def test_patch_positions_need_no_value_from_the_device() -> None:
    """On the meta device there are no values: reading one would raise."""
    grids = torch.tensor([[1, 4, 6], [3, 2, 8]])
    patches = int(grids.prod(1).sum())
    meta = torch.device("meta")
    layout = PatchLayout.build(grids, patches, meta)
    assert rotary_tables(layout.row, layout.column, 72)[0].shape == (patches, 36)
    with meta:
        embeddings = VisionEmbeddings(KeyeVisionConfig())
        assert embeddings(torch.empty(patches, 3, 14, 14, dtype=torch.uint8), layout).shape == (patches, 1152)


def test_block_order() -> None:
    layout = PatchLayout.build(torch.tensor([[1, 2, 4], [2, 2, 2]]), 16, torch.device("cpu"))
    assert layout.order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
    assert layout.row.tolist() == [0, 0, 1, 1] * 4
    assert layout.column.tolist() == [0, 1, 0, 1, 2, 3, 2, 3] + [0, 1, 0, 1] * 2
