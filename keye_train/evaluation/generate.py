"""Greedy answers to a batch of prompts.

Positions come from the processor, which knows the real seconds between video frames, so the prompt is given to the
model as embeddings with positions. Rows that have answered leave the batch; the rest goes on with a smaller cache.

Legend: B prompts, L tokens of the longest prompt, W model width, P patches of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from keye_train.model.keye import KeyeForConditionalGeneration
from keye_train.model.packed import VisionInputs
from keye_train.model.sample_encoder import EncodedSample


@torch.inference_mode()
def generate_batch(
    model: KeyeForConditionalGeneration, prompts: Sequence[EncodedSample], max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The most likely next token, again and again, until a stop token or the limit.

    Args:
        model: in eval mode.
        prompts: B encoded prompts; the order of their answers is theirs.
        max_new_tokens: limit for each answer.
        stop_ids: tokens that end an answer; they are not part of it.

    Returns:
        The new tokens of each prompt.
    """
    device = model.device
    embeds, positions, mask = _left_padded(model, prompts)
    cache = DynamicCache(config=model.config)
    # A token at place p of the row gets position p + delta; positions run slower than places where there is vision.
    deltas = positions.amax(dim=(0, 2))[:, None] + 1 - embeds.shape[1]
    output = model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    stops = torch.tensor(list(stop_ids), device=device)
    rows = torch.arange(len(prompts))  # number of the prompt that each row of the batch answers
    answers: list[list[int]] = [[] for _ in prompts]
    for made in range(1, max_new_tokens + 1):
        tokens = output.logits[:, -1].argmax(dim=-1)
        going = ~torch.isin(tokens, stops)
        for row, token in zip(rows[going.cpu()].tolist(), tokens[going].tolist(), strict=True):
            answers[row].append(token)
        if made == max_new_tokens or not bool(going.any()):
            break
        if not bool(going.all()):
            kept = going.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            rows, tokens, mask, deltas = rows[kept.cpu()], tokens[kept], mask[kept], deltas[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            past_key_values=cache,
            rope_deltas=deltas,
            use_cache=True,
            logits_to_keep=1,
        )
    return answers


def _left_padded(
    model: KeyeForConditionalGeneration, prompts: Sequence[EncodedSample]
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, L, W], positions [3, B, L] and mask [B, L] of prompts that end in the same column."""
    device, config = model.device, model.config
    longest = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        start = longest - len(prompt.input_ids)
        ids[row, start:] = prompt.input_ids
        positions[:, row, start:] = prompt.position_ids
        mask[row, start:] = 1
    ids, positions, mask = ids.to(device), positions.to(device), mask.to(device)
    embeds = model.model.embed_tokens(ids)
    patches = torch.cat([prompt.pixel_patches for prompt in prompts])
    if len(patches):
        vision = VisionInputs.build(patches, torch.cat([prompt.grid_thw for prompt in prompts]))
        features = model.vision_features(vision.to(device)).to(embeds.dtype)
        pads = (mask == 1) & ((ids == config.image_token_id) | (ids == config.video_token_id))
        embeds[pads] = features
    return embeds, positions, mask
