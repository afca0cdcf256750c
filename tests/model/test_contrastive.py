"""Promise: the SigLIP loss is the paper's, and does not depend on how pairs are spread over ranks."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

# Only what the worker processes need: each of them imports this file.
from keye_train.model.contrastive import siglip_loss, siglip_loss_distributed


def test_loss_is_the_papers_formula() -> None:
    images, texts = torch.nn.functional.normalize(torch.randn(2, 4, 8), dim=-1)
    scale, bias = torch.tensor([0.7]), torch.tensor([-3.0])
    losses = siglip_loss(images, texts, scale, bias)
    for i in range(4):
        expected = 0.0
        for j in range(4):
            z = 1.0 if i == j else -1.0
            logit = math.exp(0.7) * float(images[i] @ texts[j]) - 3.0
            expected += math.log(1 + math.exp(-z * logit))
        assert losses[i].item() == pytest.approx(expected, rel=1e-5)


SHARES = (3, 1)  # pairs of each rank: uneven on purpose


def _inputs_of_the_loss() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images, texts = torch.randn(2, sum(SHARES), 8, generator=generator)
    return images, texts, torch.tensor([1.0]), torch.tensor([-2.0])


def _rank_work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES)
    )
    images, texts, scale, bias = _inputs_of_the_loss()
    own = slice(sum(SHARES[:rank]), sum(SHARES[: rank + 1]))
    leaves = [tensor.clone().requires_grad_() for tensor in (images[own], texts[own], scale, bias)]
    losses = siglip_loss_distributed(*leaves)
    losses.sum().backward()
    torch.save((losses.detach(), [leaf.grad for leaf in leaves]), Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_uneven_ranks_equal_one_process() -> None:
    leaves = [tensor.requires_grad_() for tensor in _inputs_of_the_loss()]
    dense = siglip_loss(*leaves)
    dense.sum().backward()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_rank_work, args=(folder,), nprocs=len(SHARES))
        losses, grads = zip(*(torch.load(Path(folder) / f"rank-{rank}.pt") for rank in range(len(SHARES))), strict=True)
    assert torch.allclose(torch.cat(losses), dense, atol=1e-5)
    for position in (0, 1):  # images, texts: each rank holds its own rows
        joined = torch.cat([grad[position] for grad in grads])
        assert torch.allclose(joined, leaves[position].grad, atol=1e-5)
    for position in (2, 3):  # scale, bias: every rank holds a part of the sum
        assert torch.allclose(sum(grad[position] for grad in grads), leaves[position].grad, atol=1e-5)
