"""Promise: the chunked token loss is the plain one, in value and gradient, whatever the chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from keye_train.model import loss as loss_module
from keye_train.model.loss import LMHead

WIDTH, VOCAB = 16, 50


@pytest.fixture
def head() -> LMHead:
    torch.manual_seed(0)
    return LMHead(WIDTH, VOCAB)


@pytest.mark.parametrize("rows", [1, 7, 23])
@pytest.mark.parametrize("chunk_logits", [23, 7 * 23, 100 * VOCAB])
def test_equal_to_cross_entropy(head: LMHead, rows: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_logits)
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    targets, row_weights = torch.randint(VOCAB, (rows,)), torch.rand(rows)
    chunked = head(hidden, targets)
    plain = F.cross_entropy(head(hidden), targets, reduction="none")
    assert torch.allclose(chunked, plain, atol=1e-6)
    inputs = (hidden, head.weight)
    for measured, expected in zip(
        torch.autograd.grad((chunked * row_weights).sum(), inputs),
        torch.autograd.grad((plain * row_weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(measured, expected, atol=1e-6)


def test_no_labelled_token_keeps_the_graph(head: LMHead) -> None:
    hidden = torch.randn(0, WIDTH, requires_grad=True)
    losses = head(hidden, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
    losses.sum().backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_a_frozen_matrix_gets_no_gradient(head: LMHead) -> None:
    head.weight.requires_grad_(False)
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    head(hidden, torch.tensor([1, 2, 3])).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_bfloat16_weights_give_float32_losses(head: LMHead) -> None:
    hidden, targets = torch.randn(9, WIDTH), torch.randint(VOCAB, (9,))
    exact = head(hidden, targets)
    rounded = head.bfloat16()(hidden.bfloat16(), targets)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05


@pytest.mark.parametrize("target", [-100, -1, VOCAB, VOCAB + 5])
@pytest.mark.parametrize("chunk_logits", [7 * 23, 100 * VOCAB])
def test_a_target_outside_the_vocabulary_is_not_a_finite_loss(
    head: LMHead, target: int, chunk_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer larger than the model must stop the run, not train it on a wrong token."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", chunk_logits)
    hidden = torch.randn(23, WIDTH, requires_grad=True)
    targets = torch.randint(VOCAB, (23,))
    targets[[4, 5, 6]] = torch.tensor([0, target, VOCAB - 1])
    losses = head(hidden, targets)
    assert losses.isnan().nonzero().tolist() == [[5]]
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().any(dim=1).nonzero().tolist() == [[5]]
