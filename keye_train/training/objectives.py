"""What a stage minimises: the module that the engine runs, and how its losses are counted.

An objective gives one loss for each *item*: a labelled token (language) or an image-caption pair (contrastive). The
trainer adds them up, weighted by recipe, and divides by the weight of all items of the whole global batch, so an
objective never averages.

Legend: K items of a pack, S samples of a pack, B image-caption pairs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from keye_train.model.contrastive import siglip_loss_distributed
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.packed import IGNORE_INDEX, ContrastiveInputs, PackedInputs, VisionInputs
from keye_train.model.vision import placeholder_image
from keye_train.settings import LossWeighting, Precision

Figures = dict[str, Tensor]
"""Further scalar sums of a micro-batch, detached."""


class LanguageObjective(nn.Module):
    """Next-token cross entropy of assistant turns."""

    figures: tuple[str, ...] = ()

    def __init__(self, model: KeyeForConditionalGeneration, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.precision = precision

    def forward(self, inputs: PackedInputs) -> tuple[Tensor, Figures]:
        """Losses [K] float32 of the labelled tokens."""
        with autocast(self.precision, inputs.input_ids.device):
            return self.model(packed=inputs), {}

    def item_samples(self, inputs: PackedInputs) -> Tensor:
        """Number of the sample that each item belongs to: [K] int64."""
        return inputs.loss_samples


class ContrastiveObjective(nn.Module):
    """SigLIP loss of each image against the captions of all ranks in the same micro-step; by recipe a caption loss too.

    Which captions are an image's negatives therefore depends on the number of ranks: here, unlike in the language
    objective, another world size gives other losses.
    """

    def __init__(self, model: DualEncoder, precision: Precision, caption_weight: float = 0.0) -> None:
        """``caption_weight``: of each pair's mean caption loss, added to its contrastive loss (Kimi-VL, 2.1: 2)."""
        super().__init__()
        self.model = model
        self.precision = precision
        self.caption_weight = caption_weight
        self.figures: tuple[str, ...] = ("retrieved", "caption_loss") if caption_weight else ("retrieved",)

    def forward(self, inputs: ContrastiveInputs) -> tuple[Tensor, Figures]:
        """Losses [B] float32, and sums over the pack's pairs.

        ``retrieved``: images whose own caption is the most similar of this pack's captions; ``caption_loss``: the
        caption losses without their weight.
        """
        pairs = len(inputs.text_ids)
        if not pairs:  # every rank must run the same collectives, so both towers run on something that is cut off below
            text_ids = torch.zeros(1, inputs.text_ids.shape[1], dtype=torch.int64, device=inputs.text_ids.device)
            image = placeholder_image(text_ids)
            inputs = ContrastiveInputs(image, text_ids, _placeholder_caption(image) if self.caption_weight else None)
        with autocast(self.precision, inputs.text_ids.device):
            output = self.model(inputs)
        images, texts = output.image_embeds[:pairs], output.text_embeds[:pairs]
        losses = siglip_loss_distributed(images, texts, output.logit_scale, output.logit_bias)
        with torch.no_grad():
            nearest = (images @ texts.T).argmax(dim=1) if pairs else torch.empty(0, device=images.device)
            retrieved = (nearest == torch.arange(pairs, device=images.device)).sum()
        figures = {"retrieved": retrieved}
        if output.caption_losses is not None:
            captions = output.caption_losses[:pairs]
            losses = losses + self.caption_weight * captions
            figures["caption_loss"] = captions.detach().sum()
        return losses, figures

    def item_samples(self, inputs: ContrastiveInputs) -> Tensor:
        """Number of the sample that each item belongs to: [B] int64."""
        return torch.arange(len(inputs.text_ids))


def _placeholder_caption(image: VisionInputs) -> PackedInputs:
    """One image token and one caption token for a rank without pairs."""
    device = image.pixel_patches.device

    def numbers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return PackedInputs(
        input_ids=numbers(0, 0),
        labels=numbers(IGNORE_INDEX, 0),
        position_ids=numbers(0, 1).expand(3, 2),
        cu_seqlens=numbers(0, 2, dtype=torch.int32),
        max_seqlen=2,
        vision=image,
        vision_rows=numbers(0),
        loss_rows=numbers(0),
        loss_targets=numbers(0),
        loss_samples=numbers(0),
    )


TrainingObjective = LanguageObjective | ContrastiveObjective


WEIGHT_UNITS = 1 << 24
"""Weights of samples are added up as multiples of 1 / WEIGHT_UNITS: a sum of integers is the same for every split of a
global batch over ranks and micro-steps, which a sum of square roots is not."""


def item_weights(samples: Tensor, weighting: LossWeighting) -> Tensor | None:
    """Weight of each item: 1 / n (``per_sample``) or 1 / sqrt(n) (``square``; InternVL 2.5, arXiv 2412.05271, 3.3).

    Args:
        samples: [K] int64, number of the sample of each item. A sample lies in one pack as a whole.
        weighting: by recipe.

    Returns:
        [K] float32; None for ``per_token``, where every weight is 1.
    """
    if weighting == LossWeighting.per_token:
        return None
    of_sample = torch.bincount(samples).double()
    power = -1.0 if weighting == LossWeighting.per_sample else -0.5
    return of_sample[samples].pow(power).float()


def total_weight(samples: Tensor, weighting: LossWeighting) -> int:
    """Sum of the weights of all items of a pack, in units of 1 / ``WEIGHT_UNITS``; see :func:`item_weights`."""
    if weighting == LossWeighting.per_token:
        return len(samples) * WEIGHT_UNITS
    of_sample = torch.bincount(samples).double()  # n items of weight 1 / n, or 1 / sqrt(n)
    summed = (of_sample > 0).double() if weighting == LossWeighting.per_sample else of_sample.sqrt()
    return int((summed * WEIGHT_UNITS).round().sum())


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """bf16 matrix products on fp32 weights where the recipe says so.

    torch's autocast inside the module, not DeepSpeed's ``torch_autocast``: that one also reduces gradients in bf16, and
    the sums of one global batch would then depend on how it is split over ranks.
    """
    if precision == Precision.bf16_autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
