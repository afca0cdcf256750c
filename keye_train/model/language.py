"""The language model: Qwen3 layers with three-axis rotary positions.

Legend: B rows (1 for a pack), L tokens of a row, L' tokens with those in the cache, W model width, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from keye_train.model.attention import Segments
from keye_train.model.configuration import KeyeConfig


def mrope_tables(position_ids: Tensor, config: KeyeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles.

    The D / 2 frequencies lie in three contiguous sections that follow time, height and width (Qwen2-VL's layout);
    the second half of the head repeats the first. Angles are float32 whatever ``dtype`` is.

    Args:
        position_ids: [3, B, L].
        config: gives ``rope_theta``, ``head_dim`` and ``mrope_section``.
        dtype: of the result.

    Returns:
        Two tensors [B, L, D].
    """
    head_dim = config.attention_head_dim
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    sections = frequencies.split(config.mrope_section)
    halves = [axis[..., None].float() * section for axis, section in zip(position_ids, sections, strict=True)]
    angles = torch.cat(halves + halves, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def padded_causal_mask(attention_mask: Tensor | None, length: int, total: int, device: torch.device) -> Tensor | None:
    """Which keys each query of a padded, possibly cached batch may see.

    Args:
        attention_mask: [B, L'], non-zero at real tokens; None: no padding.
        length: L, new tokens.
        total: L', new tokens and those in the cache.
        device: of the result.

    Returns:
        [B or 1, 1, L, L'] bool, or None where a single new token sees everything.
    """
    if attention_mask is None and length == 1:
        return None
    keys = torch.arange(total, device=device)
    queries = keys[total - length :, None]
    causal = keys <= queries
    if attention_mask is None:
        return causal[None, None]
    # A padded query sees itself, so that no row of the softmax is empty; its output is never used.
    allowed = (causal & attention_mask.bool()[:, None, :]) | (keys == queries)
    return allowed[:, None]


class KeyeTextModel(nn.Module):
    """Embeddings to final hidden states, for packed rows and for padded batches with a cache."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        fields: Any = config  # has every field of Qwen3Config that a layer reads
        self.layers = nn.ModuleList(Qwen3DecoderLayer(fields, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        *,
        segments: Segments | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            embeds: [B, L, W].
            position_ids: [3, B, L].
            segments: causal segments of a packed row; then ``mask`` and ``cache`` are None.
            mask: [B, 1, L, L'] bool of a padded batch.
            cache: keys and values so far; extended in place.

        Returns:
            [B, L, W], normalised.
        """
        rotary = mrope_tables(position_ids, self.config, embeds.dtype)
        hidden = embeds
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=cache,
                segments=segments,
            )
        return self.norm(hidden)
