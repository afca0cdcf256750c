"""Promise: the SigLIP loss is the paper's, does not depend on how pairs are spread over ranks, and is exchanged in
chunks: no rank ever holds the captions or the logits of all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Only what the worker processes need: each of them imports this file.
from keye_train.data import reader_server
from keye_train.model.contrastive import siglip_loss, siglip_loss_distributed

WIDTH = 8
# Pairs of each rank: uneven, a rank with one pair, a rank with none, ranks that are all empty.
SHARES = [(3, 1), (1, 0), (0, 0), (5, 1, 7, 2), (4, 0, 0, 9), (6, 6, 6, 6)]


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


def test_autocast_does_not_round_the_loss() -> None:
    inputs = make_inputs((6,))
    exact = siglip_loss(*inputs[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(siglip_loss(*inputs[:4]), exact)


def make_inputs(shares: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images, texts, scale, bias and the weight of each image's loss."""
    generator = torch.Generator().manual_seed(5)
    images, texts = torch.randn(2, sum(shares), WIDTH, generator=generator)
    weights = torch.rand(sum(shares), generator=generator)
    return images, texts, torch.tensor([1.0]), torch.tensor([-2.0]), weights


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return result


def _rank_work(rank: int, folder: str) -> None:
    """Every split: those over two ranks in a group of the first two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = {4: None, 2: torch.distributed.new_group([0, 1])}
    results = {}
    for shares in [shares for shares in SHARES if rank < len(shares)]:
        images, texts, scale, bias, weights = make_inputs(shares)
        own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
        leaves = [tensor.clone().requires_grad_() for tensor in (images[own], texts[own], scale, bias)]
        with LargestTensor() as largest:
            losses = siglip_loss_distributed(*leaves, group=groups[len(shares)])
            (losses * weights[own]).sum().backward()
        results[shares] = (losses.detach(), [leaf.grad for leaf in leaves], largest.elements)
    torch.save(results, Path(folder) / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of four processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    reader_server.prepare("keye_train.data.loader")  # the server of other tests' readers, too
    multiprocessing.start_processes(_rank_work, args=(str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(4)]


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_uneven_ranks_equal_one_process(ranks: list[dict], shares: tuple[int, ...]) -> None:
    *leaves, weights = make_inputs(shares)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    dense = siglip_loss(*leaves)
    (dense * weights).sum().backward()
    losses, grads, largest = zip(*(rank[shares] for rank in ranks[: len(shares)]), strict=True)
    assert torch.allclose(torch.cat(losses), dense, atol=1e-5)
    for position in (0, 1):  # images, texts: each rank holds its own rows
        joined = torch.cat([grad[position] for grad in grads])
        assert torch.allclose(joined, leaves[position].grad, atol=1e-5)
    for position in (2, 3):  # scale, bias: every rank holds a part of the sum
        assert torch.allclose(sum(grad[position] for grad in grads), leaves[position].grad, atol=1e-4)
    most = max(1, *shares)
    assert max(largest) <= most * max(WIDTH, most)  # one chunk of captions, or one block of logits
