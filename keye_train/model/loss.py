"""The output matrix and the token loss, without ever holding the logits of all tokens.

Legend: K labelled tokens, W model width, V vocabulary (151,936: the float32 logits of 16 k tokens would take 10 GB).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 2**27  # logits held at a time: 0.5 GB in float32


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

    Logits are formed a chunk of rows at a time, and again in the backward; softmax and loss are float32.

    Args:
        hidden: [K, W].
        weight: [V, W].
        targets: [K] int64.

    Returns:
        [K] float32.
    """
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, targets, compute, max(1, CHUNK_LOGITS // weight.shape[0]))


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps only the log-sum-exp of each row between forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, compute: torch.dtype, chunk_rows: int
    ) -> Tensor:
        log_sums = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        losses = torch.empty_like(log_sums)
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = F.linear(hidden[rows].to(compute), matrix).float()
                log_sums[rows] = logits.logsumexp(dim=1)
                losses[rows] = log_sums[rows] - logits.gather(1, targets[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.compute, ctx.chunk_rows = compute, chunk_rows
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # float32: chunks are added up here, and half precision would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.compute)
            for start in range(0, hidden.shape[0], ctx.chunk_rows):
                rows = slice(start, start + ctx.chunk_rows)
                states = hidden[rows].to(ctx.compute)
                # d loss / d logits = softmax - one_hot(target)
                slopes = F.linear(states, matrix).float().sub_(log_sums[rows, None]).exp_()
                slopes.scatter_add_(1, targets[rows, None], slopes.new_full((len(states), 1), -1.0))
                slopes = slopes.mul_(grad_losses[rows, None]).to(ctx.compute)
                if grad_hidden is not None:
                    grad_hidden[rows] = slopes @ matrix
                if grad_weight is not None:
                    grad_weight += slopes.T @ states
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None
