"""The output matrix and the token loss, without ever holding the logits of all tokens.

Legend: K labelled tokens, W model width, V vocabulary (151,936: the float32 logits of 16 k tokens would take 10 GB).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from keye_train.model.autocasting import autocast_dtype, without_autocast

CHUNK_LOGITS = 2**26  # logits held at a time: 0.25 GB in float32
BAND_ROWS = 8192


class LMHead(nn.Linear):
    """Hidden states to logits, or to the loss of each token.

    Both go through ``forward``, so that hooks on the module (ZeRO-3 gathers the weight there) see every use.
    """

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__(width, vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits, or the cross entropy of each row.

        Args:
            hidden: [..., W]; with targets [K, W], K may be 0.
            targets: [K] int64.

        Returns:
            Logits [..., V] without targets; else losses [K] float32.
        """
        if targets is None:
            return super().forward(hidden)
        return linear_cross_entropy(hidden, self.weight, targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of ``hidden @ weight.T`` with ``targets``, row by row.

    The vocabulary is walked in blocks: logits of all rows for one block at a time, and again in the backward. Softmax
    and loss are float32. Blocks of the vocabulary, not of the rows: each block of the weight's gradient is then one
    matrix product, finished at once, where blocks of rows would add up a float32 copy of the whole matrix.

    Args:
        hidden: [K, W].
        weight: [V, W].
        targets: [K] int64.

    Returns:
        [K] float32. A target that is no id of the vocabulary gives NaN: looking for one would wait for the device,
        and the check of a step for finite numbers stops at it.
    """
    compute = autocast_dtype(hidden.device) or weight.dtype
    # max(K, W): neither a block's logits nor its copy of the weight in another data type are larger than the limit.
    block = max(1, CHUNK_LOGITS // max(hidden.shape))
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, compute, block)
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps only the log-sum-exp of each row between forward and backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, compute: torch.dtype, block: int) -> Tensor:
        rows = hidden.shape[0]
        largest = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        sums = torch.zeros_like(largest)  # of exp(logit - largest), over the blocks so far
        of_target = torch.zeros_like(largest)
        found = torch.zeros_like(targets, dtype=torch.bool)
        with without_autocast(hidden.device):
            states = hidden.to(compute)
            for start in range(0, weight.shape[0], block):
                logits = F.linear(states, weight[start : start + block].to(compute)).float()
                place, inside = _places(targets, start, logits.shape[1])
                of_target += logits.gather(1, place)[:, 0] * inside
                found |= inside
                raised = torch.maximum(largest, logits.amax(dim=1))
                sums = sums * (largest - raised).exp() + logits.sub_(raised[:, None]).exp_().sum(dim=1)
                largest = raised
        log_sums = torch.where(found, largest + sums.log(), torch.nan)  # kept: the gradients are NaN as well
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.compute, ctx.block = compute, block
        return log_sums - of_target

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        # float32: blocks are added up here, and half precision would lose the small ones.
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.empty_like(weight) if needs_weight else None
        with without_autocast(hidden.device):
            states = hidden.to(ctx.compute)
            for start in range(0, weight.shape[0], ctx.block):
                columns = slice(start, start + ctx.block)
                matrix = weight[columns].to(ctx.compute)
                # d loss / d logits = softmax - one_hot(target)
                slopes = F.linear(states, matrix).float().sub_(log_sums[:, None]).exp_()
                place, inside = _places(targets, start, slopes.shape[1])
                slopes.scatter_add_(1, place, -inside[:, None].float())
                slopes = slopes.mul_(grad_losses[:, None]).to(ctx.compute)
                if grad_hidden is not None:
                    _add_product(grad_hidden, slopes, matrix)
                if grad_weight is not None:
                    grad_weight[columns] = slopes.T @ states
                del slopes  # before the next block's logits take its room
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, None, None, None


def _places(targets: Tensor, start: int, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each row's target in this block, [K, 1], and whether it lies in the block, [K]."""
    place = targets - start
    inside = (place >= 0) & (place < columns)
    return place.clamp(0, columns - 1)[:, None], inside


def _add_product(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """``sums += left @ right`` in bands of rows: adding another data type to float32 needs room for a copy."""
    for own, part in zip(sums.split(BAND_ROWS), left.split(BAND_ROWS), strict=True):
        own += part @ right
