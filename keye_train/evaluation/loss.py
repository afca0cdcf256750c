"""Held-out loss: mean cross entropy of the answers' tokens, as in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from keye_train.data.collate import collate_samples
from keye_train.data.heldout import fill_packs
from keye_train.data.packing import Budget
from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.sample_encoder import EncodedSample
from keye_train.settings import ModelSettings

PACK_TOKENS = 8192
PACK_PATCHES = 16384
"""Budgets of a pack; a larger sample gets a pack of its own."""


def heldout_loss(
    model: KeyeForConditionalGeneration, samples: Sequence[EncodedSample], settings: ModelSettings
) -> tuple[float, int]:
    """Sum of the losses of all labelled tokens of ``samples``, and the number of these tokens."""
    losses, tokens = sample_losses(model, samples, settings)
    return float(losses.sum()), int(tokens.sum())


@torch.inference_mode()
def sample_losses(
    model: KeyeForConditionalGeneration, samples: Sequence[EncodedSample], settings: ModelSettings
) -> tuple[Tensor, Tensor]:
    """Of each sample the sum of the losses of its labelled tokens, [N] float64, and their number, [N] int64."""
    losses, tokens = [], []
    for members in packs(samples):
        inputs = collate_samples(members, settings).to(model.device)
        values = model.forward_packed(inputs).double()
        sums = torch.zeros(len(members), dtype=torch.float64, device=values.device)
        losses.append(sums.index_add_(0, inputs.loss_samples, values).cpu())
        tokens.append(torch.bincount(inputs.loss_samples, minlength=len(members)).cpu())
    return torch.cat(losses), torch.cat(tokens)


def packs(samples: Sequence[EncodedSample]) -> Iterator[list[EncodedSample]]:
    """Neighbouring samples that share a pack, within both budgets."""
    sizes = [(len(sample.input_ids), len(sample.pixel_patches)) for sample in samples]
    return fill_packs(samples, sizes, Budget(PACK_TOKENS, PACK_PATCHES))
