"""Encoded samples -> the tensors of one pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from keye_train.model.packed import IGNORE_INDEX, ContrastiveInputs, PackedInputs, VisionInputs
from keye_train.model.positions import PATCH_SIZE, grid_tokens, sample_positions
from keye_train.model.sample_encoder import EncodedPair, EncodedSample
from keye_train.sample import SampleRef
from keye_train.settings import ModelSettings


@dataclass(frozen=True)
class LoadedPack:
    """One pack, ready for the model, with an account of its samples."""

    inputs: PackedInputs | ContrastiveInputs
    refs: tuple[SampleRef, ...]  # samples in the pack, in order: number i of PackedInputs.loss_samples is refs[i]
    tasks: tuple[str, ...]  # task of each
    skipped: tuple[tuple[SampleRef, str], ...]  # samples that were planned and could not be read, with the reason
    tokens: int  # language tokens (pairs: caption tokens, padding included) that were really read
    patches: int  # vision patches that were really read
    fill: float  # planned tokens / stage.max_tokens
    digest: int = 0  # of the samples that were read, see data.digest
    changed: int = 0  # samples that were read in part or at a lower resolution, see data.overlong

    @property
    def sources(self) -> tuple[str, ...]:
        """Source of each sample."""
        return tuple(ref.source for ref in self.refs)


def collate_samples(
    samples: Sequence[EncodedSample], model: ModelSettings, patches: Tensor | None = None
) -> PackedInputs:
    """Lay samples one behind another.

    Without a single sample the pack is one pad token that teaches nothing: every rank must run the same collectives,
    whatever its data hold.

    Args:
        samples: of one pack, in order.
        model: whose tokens stand for media.
        patches: [P, 3, 14, 14] uint8 of all samples, where they stand one behind another already.
    """
    ids = model.special_tokens
    vision = _vision(samples, patches)
    if not samples:
        return PackedInputs.build(
            input_ids=torch.tensor([ids.pad]),
            labels=torch.tensor([IGNORE_INDEX]),
            position_ids=torch.zeros(3, 1, dtype=torch.int64),
            sample_lengths=[1],
            vision=vision,
            vision_token_ids=(ids.image_pad, ids.video_pad),
        )
    return PackedInputs.build(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        labels=torch.cat([sample.labels for sample in samples]),
        position_ids=torch.cat([sample.position_ids for sample in samples], dim=1),
        sample_lengths=[len(sample.input_ids) for sample in samples],
        vision=vision,
        vision_token_ids=(ids.image_pad, ids.video_pad),
    )


def collate_pairs(
    pairs: Sequence[EncodedPair], model: ModelSettings, captions: bool = False, patches: Tensor | None = None
) -> ContrastiveInputs:
    """Images one behind another, captions as rows; no pair at all gives B = 0.

    Args:
        pairs: of one pack, in order.
        model: whose text tower reads the captions.
        captions: lay out the images' tokens and captions for the caption loss too.
        patches: see ``collate_samples``.
    """
    no_text = torch.empty(0, model.text_tower.max_tokens, dtype=torch.int64)
    text_ids = torch.stack([pair.text_ids for pair in pairs]) if pairs else no_text
    vision = _vision(pairs, patches)
    return ContrastiveInputs(vision, text_ids, _captions(pairs, vision) if captions else None)


def _captions(pairs: Sequence[EncodedPair], vision: VisionInputs) -> PackedInputs:
    """``[image tokens][caption tokens]`` of each pair, one behind another; the caption's tokens are the labels.

    The decoder has no words for images: rows of image tokens hold id 0, which is replaced by the projector's output.
    """
    image = -1
    ids, labels, positions = [], [], []
    for pair in pairs:
        tokens = grid_tokens(pair.grid_thw[0].tolist())
        caption = pair.text_ids[: pair.caption_tokens]
        ids.append(torch.cat([torch.full((tokens,), image), caption]))
        labels.append(torch.cat([torch.full((tokens,), IGNORE_INDEX), caption]))
        positions.append(
            sample_positions(ids[-1], pair.grid_thw.tolist(), [0.0], image_pad_id=image, video_pad_id=image - 1)
        )
    no_ids = torch.empty(0, dtype=torch.int64)
    packed = PackedInputs.build(
        torch.cat([no_ids, *ids]),
        torch.cat([no_ids, *labels]),
        torch.cat([torch.empty(3, 0, dtype=torch.int64), *positions], dim=1),
        [len(row) for row in ids],
        vision,
        (image, image),
    )
    return replace(packed, input_ids=packed.input_ids.clamp(min=0))


def _vision(samples: Sequence[EncodedSample | EncodedPair], patches: Tensor | None) -> VisionInputs:
    if patches is None:
        no_patches = torch.empty(0, 3, PATCH_SIZE, PATCH_SIZE, dtype=torch.uint8)
        patches = torch.cat([no_patches, *(sample.pixel_patches for sample in samples)])
    no_grid = torch.empty(0, 3, dtype=torch.int64)
    return VisionInputs.build(patches, torch.cat([no_grid, *(sample.grid_thw for sample in samples)]))
