"""The SigLIP loss, on one process and over all ranks.

Legend: B image-caption pairs of this rank, N the most pairs of any rank, C width of the vectors.

Over ranks the captions travel in a ring (SigLIP paper, section 3.3): each rank holds the captions of one rank at a
time, scores its own images against them and passes them on. Memory is one [B, N] block and a few [N, C] chunks whatever
the number of ranks; neither the logits of all ranks nor the captions of all ranks ever stand in one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from keye_train.model.autocasting import without_autocast

Group = dist.ProcessGroup


def siglip_loss(
    image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, partners: bool = True
) -> Tensor:
    """Sigmoid loss of each image against every text (SigLIP paper, equation 1, before the mean). Always float32.

    Args:
        image_embeds: [B, C], length 1.
        text_embeds: [B', C], length 1.
        logit_scale: [1], logarithm of the temperature.
        logit_bias: [1].
        partners: the text of image i is row i (and B' = B); false: no image has its own text here.

    Returns:
        [B] float32: for each image, the sum over all texts. Their sum divided by the number of pairs is the loss.
    """
    with without_autocast(image_embeds.device):
        similarity = image_embeds.float() @ text_embeds.float().T
        logits = similarity * logit_scale.float().exp() + logit_bias.float()
    signs = torch.full_like(logits, -1.0)
    if partners:
        signs.diagonal().fill_(1.0)
    return -F.logsigmoid(signs * logits).sum(dim=1)


def siglip_loss_distributed(
    image_embeds: Tensor,
    text_embeds: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    group: Group | None = None,
) -> Tensor:
    """``siglip_loss`` of this rank's images against the texts of all ranks, which may hold different numbers of pairs.

    Summed over the ranks, losses and gradients are those of one process with all pairs.

    Args:
        image_embeds, text_embeds: [B, C]; B may be 0.
        logit_scale, logit_bias: [1].
        group: ranks that take part; None: all.

    Returns:
        [B] float32.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias)
    sizes = _pairs_of_ranks(len(text_embeds), text_embeds.device, group)
    leaves = (image_embeds.float(), text_embeds.float(), logit_scale.float(), logit_bias.float())
    losses: Tensor = _RingLoss.apply(*leaves, sizes, group)
    return losses


class _RingLoss(torch.autograd.Function):
    """Both directions run the ring; the backward scores each block again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, sizes: list[int], group: Group | None
    ) -> Tensor:
        ctx.save_for_backward(images, texts, scale, bias)
        ctx.sizes, ctx.group = sizes, group
        losses = torch.zeros(len(images), device=images.device)
        held = _pad(texts, sizes)
        for step, owner in enumerate(_visits(sizes, group)):
            arriving = _pass_on(held, group)  # travels while this block is scored
            losses += siglip_loss(images, held[: sizes[owner]], scale, bias, partners=step == 0)
            held = arriving()
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias = ctx.saved_tensors
        held = _pad(texts, ctx.sizes)
        grad_images, grad_scale, grad_bias = (torch.zeros_like(part) for part in (images, scale, bias))
        grad_held = torch.zeros_like(held)  # travels with the texts, and is back home after the last step
        for step, owner in enumerate(_visits(ctx.sizes, ctx.group)):
            arriving = _pass_on(held, ctx.group)
            rows = slice(ctx.sizes[owner])
            with torch.enable_grad():
                leaves = tuple(part.detach().requires_grad_() for part in (images, held[rows], scale, bias))
                losses = siglip_loss(*leaves, partners=step == 0)
            of_images, of_texts, of_scale, of_bias = torch.autograd.grad(losses, leaves, grad_losses)
            grad_images += of_images
            grad_scale += of_scale
            grad_bias += of_bias
            grad_held[rows] += of_texts
            held = arriving()
            grad_held = _pass_on(grad_held, ctx.group)()
        return grad_images, grad_held[: len(texts)], grad_scale, grad_bias, None, None


def _visits(sizes: list[int], group: Group | None) -> list[int]:
    """Whose texts this rank holds at each step: its own first, then those of the ranks after it."""
    rank = dist.get_rank(group)
    return [(rank + step) % len(sizes) for step in range(len(sizes))]


def _pad(texts: Tensor, sizes: list[int]) -> Tensor:
    """[B, C] -> [N, C], at least one row: messages of one size."""
    return F.pad(texts, (0, 0, 0, max(1, *sizes) - len(texts)))


def _pass_on(held: Tensor, group: Group | None) -> Callable[[], Tensor]:
    """Send to the rank before, receive from the rank after. Returns at once; the call of the result waits."""
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    rank, received = dist.get_rank(group), torch.empty_like(held)
    # Collective: every rank must reach this.
    pending = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, held, members[rank - 1], group),
            dist.P2POp(dist.irecv, received, members[(rank + 1) % len(members)], group),
        ]
    )

    def wait() -> Tensor:
        for request in pending:
            request.wait()
        return received

    return wait


def _pairs_of_ranks(own: int, device: torch.device, group: Group | None) -> list[int]:
    """Number of pairs of each rank, agreed upon without waiting for the device."""
    group = group or dist.group.WORLD
    assert group is not None
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    # Collective: every rank must reach this.
    dist.all_gather_into_tensor(counts, torch.tensor([own]), group=_host_group(group, device))
    return counts.tolist()


_host_groups: dict[Group, Group] = {}


def _host_group(group: Group, device: torch.device) -> Group:
    """The group itself where it works on CPU tensors, else one of the same ranks that does, made at the first call."""
    if device.type == "cpu":
        return group
    if group not in _host_groups:
        ranks = dist.get_process_group_ranks(group)
        _host_groups[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _host_groups[group]
