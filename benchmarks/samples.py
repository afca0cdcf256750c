"""Made-up samples with Keye-like lengths, encoded: what the benchmarks train on. Random ids and pixels, no files.

Lengths are log-normal, by kind; a ``scale`` of 1 gives those of ``benchmarks.plan`` (a caption of about 100 tokens, an
image of about 500, a video of several thousand), smaller scales the same shape for smaller packs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from keye_train.data.packing import Budget, pack_samples
from keye_train.model.packed import IGNORE_INDEX
from keye_train.model.positions import sample_positions
from keye_train.model.sample_encoder import EncodedSample
from keye_train.sample import SampleRef
from keye_train.settings import ModelSettings

LABELLED_SHARE = 0.5  # of the text tokens: the answers
LEAST_TEXT = 8  # tokens: the turns' headers


@dataclass(frozen=True)
class Kind:
    """One kind of sample: its share of the samples, medians of its lengths in tokens, and how far lengths spread."""

    share: float
    text_tokens: float
    vision_tokens: float  # 0: no picture
    frames: int = 1
    text_spread: float = 0.7  # standard deviation of the logarithm
    vision_spread: float = 0.8


MIX = {
    "caption": Kind(0.45, 90, 490),
    "ocr": Kind(0.20, 245, 990),
    "vqa": Kind(0.15, 150, 545),
    "text": Kind(0.12, 545, 0),
    "video": Kind(0.08, 150, 4450, frames=8),
}


def draw_samples(
    model: ModelSettings, count: int, scale: float, max_tokens: int, seed: int, mix: Mapping[str, Kind] = MIX
) -> list[EncodedSample]:
    """Samples of a mix.

    Args:
        model: gives the vocabulary and the special tokens.
        count: how many.
        scale: factor of all medians.
        max_tokens: longest sample; vision takes at most three quarters of it, the text the rest.
        seed: of lengths, ids and pixels.
        mix: kinds of samples; their shares need not sum to 1.
    """
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in mix.values()])
    names = rng.choice(list(mix), size=count, p=shares / shares.sum())
    return [_sample(model, name, mix[name], scale, max_tokens, rng) for name in names.tolist()]


def _sample(
    model: ModelSettings, name: str, kind: Kind, scale: float, max_tokens: int, rng: np.random.Generator
) -> EncodedSample:
    ids = model.special_tokens
    grid = None
    if kind.vision_tokens:
        wanted = min(kind.vision_tokens * scale * np.exp(rng.normal(0, kind.vision_spread)), 0.75 * max_tokens)
        grid = _grid(wanted, kind.frames)
    vision = 0 if grid is None else grid[0] * grid[1] * grid[2] // 4
    room = max_tokens - vision - (2 if grid else 0)
    text = min(int(kind.text_tokens * scale * np.exp(rng.normal(0, kind.text_spread))) + LEAST_TEXT, room)
    words = torch.from_numpy(rng.integers(*_ordinary_ids(model), text))
    labels = words.clone()
    labels[: text - int(text * LABELLED_SHARE)] = IGNORE_INDEX
    pads = torch.full((vision,), ids.video_pad if kind.frames > 1 else ids.image_pad)
    if grid is not None:
        media = torch.cat([torch.tensor([ids.vision_start]), pads, torch.tensor([ids.vision_end])])
        words = torch.cat([media, words])
        labels = torch.cat([torch.full_like(media, IGNORE_INDEX), labels])
    grids = [] if grid is None else [grid]
    seconds = [0.5 if kind.frames > 1 else 0.0] * len(grids)
    return EncodedSample(
        ref=SampleRef(name, "", ""),
        task=name,
        input_ids=words,
        labels=labels,
        position_ids=sample_positions(words, grids, seconds, image_pad_id=ids.image_pad, video_pad_id=ids.video_pad),
        pixel_patches=torch.from_numpy(rng.integers(0, 256, (4 * vision, 3, 14, 14), dtype=np.uint8)),
        grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
    )


def _ordinary_ids(model: ModelSettings) -> tuple[int, int]:
    """First and last + 1 of a range without special tokens, which stand either first or last in a vocabulary."""
    special = vars(model.special_tokens).values()
    below, above = (0, min(special)), (max(special) + 1, model.language.vocab_size)
    return max(below, above, key=lambda ids: ids[1] - ids[0])


def _grid(tokens: float, frames: int) -> tuple[int, int, int]:
    """A grid (t, h, w) in patches, about 4 : 3, of at most ``tokens`` language tokens where one frame of 1 fits."""
    frames = max(1, min(frames, int(tokens)))
    height = max(1, int((tokens / frames * 0.75) ** 0.5))
    width = max(1, int(tokens / frames / height))
    return frames, 2 * height, 2 * width


def into_packs(samples: Sequence[EncodedSample], budget: Budget) -> list[list[EncodedSample]]:
    """All samples in as few packs as the plan's packing finds."""
    tokens = np.array([len(sample.input_ids) for sample in samples])
    patches = np.array([len(sample.pixel_patches) for sample in samples])
    packs = max(1, budget.packs(tokens, patches))
    while len((packing := pack_samples(tokens, patches, budget, packs)).left):
        packs += 1
    return [[samples[place] for place in packing.members(number)] for number in range(len(packing))]


def full_pack(samples: Sequence[EncodedSample], budget: Budget) -> list[EncodedSample]:
    """The fullest pack that these samples make."""
    return max(into_packs(samples, budget), key=lambda pack: sum(len(sample.input_ids) for sample in pack))
