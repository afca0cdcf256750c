"""The SigLIP loss, on one process and over all ranks.

Legend: B image-caption pairs of this rank, N the most pairs of any rank, C width of the vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, first_text: int = 0
) -> Tensor:
    """Sigmoid loss of each image against every text (SigLIP paper, equation 1, before the mean).

    Args:
        image_embeds: [B, C], length 1.
        text_embeds: [B', C], length 1; the text of image i is row ``first_text + i``, all others are negatives.
        logit_scale: [1], logarithm of the temperature.
        logit_bias: [1].
        first_text: row of the first image's text.

    Returns:
        [B] float32: for each image, the sum over all texts. Their sum divided by the number of pairs is the loss.
    """
    logits = image_embeds.float() @ text_embeds.float().T * logit_scale.exp() + logit_bias
    signs = torch.full_like(logits, -1.0)
    signs.diagonal(first_text).fill_(1.0)
    return -F.logsigmoid(signs * logits).sum(dim=1)


def siglip_loss_distributed(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """``siglip_loss`` of this rank's images against the texts of all ranks, which may hold different numbers of pairs.

    Summed over the ranks, losses and gradients are those of one process with all pairs.

    Args:
        group: ranks that take part; None: all.

    Returns:
        [B] float32.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    world, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    counts = torch.empty(world, dtype=torch.int64, device=text_embeds.device)
    # Collective: every rank must reach this.
    torch.distributed.all_gather_into_tensor(counts, counts.new_tensor([len(text_embeds)]), group=group)
    sizes = counts.tolist()
    padded = F.pad(text_embeds, (0, 0, 0, max(sizes) - len(text_embeds)))
    everyone: Tensor = _AllGather.apply(padded, group)
    texts = torch.cat([part[:size] for part, size in zip(everyone, sizes, strict=True)])
    return siglip_loss(image_embeds, texts, logit_scale, logit_bias, first_text=sum(sizes[:rank]))


class _AllGather(torch.autograd.Function):
    """[N, C] of each rank -> [world, N, C] on every rank; the backward adds up what all ranks ask of each row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
        ctx.group = group
        world = torch.distributed.get_world_size(group)
        gathered = rows.new_empty(world * rows.shape[0], rows.shape[1])
        # Collective: every rank must reach this.
        torch.distributed.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
        return gathered.unflatten(0, (world, -1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(grad.shape[1:])
        # Collective: every rank must reach this.
        torch.distributed.reduce_scatter_tensor(own, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return own, None
