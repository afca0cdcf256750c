"""Image-text retrieval of Stage 0's two towers on held-out pairs.

Captions may repeat; pairs with one caption are partners of each other, and a caption counts once as a candidate.
Legend: N pairs, U different captions, C width of the vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keye_train.data.collate import collate_pairs
from keye_train.evaluation.scoring import interval
from keye_train.model.dual_encoder import DualEncoder
from keye_train.model.sample_encoder import EncodedPair
from keye_train.settings import ModelSettings

RECALLS = (1, 5)
BATCH_PAIRS = 64


@torch.inference_mode()
def embed_pairs(
    model: DualEncoder, pairs: Sequence[EncodedPair], settings: ModelSettings, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Vectors of images and captions: two [N, C] float32 tensors of rows of length 1, on the CPU."""
    images, texts = [], []
    for start in range(0, len(pairs), BATCH_PAIRS):
        output = model(collate_pairs(pairs[start : start + BATCH_PAIRS], settings).to(device))
        images.append(output.image_embeds.cpu())
        texts.append(output.text_embeds.cpu())
    return torch.cat(images), torch.cat(texts)


def retrieval_scores(images: Tensor, texts: Tensor, captions: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Recall at 1 and 5 in both directions, each with its interval and the level of chance.

    Args:
        images: [N, C], rows of length 1.
        texts: [N, C], rows of length 1; equal captions have equal rows.
        captions: N captions as token ids; equal ones are partners of the same images.

    Returns:
        ``n`` and, for ``image_to_text`` and ``text_to_image``, ``r1`` and ``r5``: score, low, high, chance.
    """
    unique = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    caption_of_image = torch.tensor([unique[caption] for caption in captions])  # [N]
    first = torch.tensor([captions.index(caption) for caption in unique])  # [U] row of each caption
    similarity = images @ texts[first].T  # [N, U]
    partners = caption_of_image[:, None] == torch.arange(len(unique))  # [N, U]
    return {
        "n": len(captions),
        "image_to_text": _recalls(similarity, partners),
        "text_to_image": _recalls(similarity.T, partners.T),
    }


def _recalls(similarity: Tensor, partners: Tensor) -> dict[str, dict[str, float]]:
    """Recalls over queries (rows) and candidates (columns)."""
    best = similarity.masked_fill(~partners, -math.inf).amax(dim=1)
    # Ties count against the model: one that finds everything alike retrieves nothing.
    ahead = ((similarity >= best[:, None]) & ~partners).sum(dim=1)
    candidates = similarity.shape[1]
    recalls = {}
    for k in RECALLS:
        hits = (ahead < k).double().tolist()
        low, high = interval(hits)
        luck = [_chance(int(count), candidates, k) for count in partners.sum(dim=1)]
        recalls[f"r{k}"] = {
            "score": sum(hits) / len(hits),
            "low": low,
            "high": high,
            "chance": sum(luck) / len(luck),
        }
    return recalls


def _chance(partners: int, candidates: int, k: int) -> float:
    """Probability that at least one partner is among ``k`` candidates drawn at random."""
    drawn = min(k, candidates)
    return 1 - math.comb(candidates - partners, drawn) / math.comb(candidates, drawn)
