"""What one micro-step reads: many samples in one row, with no padding between them.

Shape legend: T packed language tokens, S samples, K labelled tokens, M images and videos, P vision patches of all of
them, B image-caption pairs, L caption tokens.

Everything that a forward would otherwise have to look up in tensor *values* (row numbers, longest segment) is made
here, on the CPU, so that the model never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


def upload(tensor: Tensor, device: torch.device | str, non_blocking: bool = True) -> Tensor:
    """The same on a device.

    A copy to a GPU out of pageable memory may wait for what its stream has to do: it goes through page-locked memory.
    Torch's allocator hands that out from a cache, and again only after the event of the copy: nobody has to keep it.
    """
    if non_blocking and torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


@dataclass(frozen=True)
class VisionInputs:
    """Patches of all images and videos of a pack, each in raster order (t, h, w)."""

    pixel_patches: Tensor  # [P, 3, 14, 14] uint8 levels; P = 0 where the pack has no vision
    grid_thw: Tensor  # [M, 3] int64, in patches; h and w are even. Stays on the CPU
    cu_seqlens: Tensor  # [M + 1] int32: one attention segment per image and per WHOLE video
    max_seqlen: int  # longest segment, 0 where M = 0

    @classmethod
    def build(cls, pixel_patches: Tensor, grid_thw: Tensor) -> VisionInputs:
        """Derive the segments from the grids.

        Args:
            pixel_patches: [P, 3, 14, 14] uint8.
            grid_thw: [M, 3] int64 on the CPU.
        """
        lengths = grid_thw.prod(dim=1)
        assert int(lengths.sum()) == pixel_patches.shape[0], "grids and patches disagree"
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        return cls(pixel_patches, grid_thw, cu_seqlens, int(lengths.max()) if len(lengths) else 0)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> VisionInputs:
        """Move the tensors the device reads; ``grid_thw`` stays on the CPU."""
        return replace(
            self,
            pixel_patches=upload(self.pixel_patches, device, non_blocking),
            cu_seqlens=upload(self.cu_seqlens, device, non_blocking),
        )


@dataclass(frozen=True)
class PackedInputs:
    """One pack for the language objective."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, not shifted; IGNORE_INDEX outside assistant turns and at the first token of a sample
    position_ids: Tensor  # [3, T] int64: time, height, width; restarts with each sample
    cu_seqlens: Tensor  # [S + 1] int32: one causal attention segment per sample
    max_seqlen: int  # longest sample
    vision: VisionInputs
    vision_rows: Tensor  # [P / 4] int64: rows of the pack that the projector's output replaces, in order of the grids
    loss_rows: Tensor  # [K] int64: rows whose hidden state predicts a labelled token
    loss_targets: Tensor  # [K] int64: the labelled tokens
    loss_samples: Tensor  # [K] int64: number (0 .. S - 1) of the sample each belongs to

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        sample_lengths: Sequence[int],
        vision: VisionInputs,
        vision_token_ids: tuple[int, int],
    ) -> PackedInputs:
        """Derive segments and row numbers of a pack, on the CPU.

        Args:
            input_ids: [T] int64, the samples one after another.
            labels: [T] int64, not shifted.
            position_ids: [3, T] int64.
            sample_lengths: tokens of each sample; they sum to T.
            vision: images and videos in the order in which their pad tokens stand in ``input_ids``.
            vision_token_ids: ids of the image and video pad tokens.
        """
        assert sum(sample_lengths) == input_ids.shape[0], "sample lengths do not cover the pack"
        lengths = torch.tensor(list(sample_lengths), dtype=torch.int64)
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths.cumsum(0)
        labels = labels.clone()
        labels[cu_seqlens[:-1].long()] = IGNORE_INDEX  # nothing before a sample may predict its first token
        labelled = (labels != IGNORE_INDEX).nonzero(as_tuple=True)[0]
        sample_of_row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        is_vision = (input_ids == vision_token_ids[0]) | (input_ids == vision_token_ids[1])
        vision_rows = is_vision.nonzero(as_tuple=True)[0]
        assert len(vision_rows) * 4 == vision.pixel_patches.shape[0], "pad tokens and patches disagree"
        return cls(
            input_ids=input_ids,
            labels=labels,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths.max()) if len(lengths) else 0,
            vision=vision,
            vision_rows=vision_rows,
            loss_rows=labelled - 1,
            loss_targets=labels[labelled],
            loss_samples=sample_of_row[labelled],
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> PackedInputs:
        """Move every tensor that the device reads."""
        moved: dict[str, Any] = {
            f.name: upload(value, device, non_blocking) if isinstance(value, Tensor) else value.to(device, non_blocking)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor | VisionInputs)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class ContrastiveInputs:
    """One pack of image-caption pairs for Stage 0."""

    vision: VisionInputs  # exactly one image for each caption, in the same order
    text_ids: Tensor  # [B, L] int64, right-padded to the text tower's max_tokens
    captions: PackedInputs | None = None  # for the caption loss: sample i is image i and its caption

    def to(self, device: torch.device | str, non_blocking: bool = True) -> ContrastiveInputs:
        """Move every tensor that the device reads."""
        vision = self.vision.to(device, non_blocking)
        captions = self.captions
        if captions is not None:
            captions = replace(captions, vision=vision).to(device, non_blocking)
        return ContrastiveInputs(vision, upload(self.text_ids, device, non_blocking), captions)
