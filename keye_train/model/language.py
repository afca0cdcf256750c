"""The language model: Qwen3 layers with three-axis rotary positions.

Legend: B rows (1 for a pack), L tokens of a row, L' tokens with those in the cache, H heads, W model width, D head
width.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm

from keye_train.model.attention import PACKED_ATTENTION, Segments
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


class KeyeTextModel(nn.Module):
    """Embeddings to final hidden states, for packed rows and for padded batches with a cache."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.config = config
        # The layers ask their configuration for an attention function. Theirs always names the one that knows packed
        # rows; ``config`` keeps the user's choice for padded batches.
        layer_config: Any = deepcopy(config)  # has every field of Qwen3Config that a layer reads
        layer_config._attn_implementation = PACKED_ATTENTION
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Qwen3DecoderLayer(layer_config, index) for index in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor,
        *,
        segments: Segments | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        states: list[Tensor] | None = None,
        weights: list[Tensor | None] | None = None,
    ) -> Tensor:
        """Run the layers.

        Args:
            embeds: [B, L, W].
            position_ids: [3, B, L].
            segments: causal segments of a packed row; the arguments below belong to padded batches.
            attention_mask: [B, L'], non-zero at real tokens (or a mask [B, 1, L, L'] that is used as it is);
                None: no padding.
            cache: keys and values so far; extended in place.
            states: filled with the hidden states, the input of each layer and the result: layers + 1 of [B, L, W].
            weights: filled with the attention weights of each layer, [B, H, L, L'].

        Returns:
            [B, L, W], normalised.
        """
        rotary = mrope_tables(position_ids, self.config, embeds.dtype)
        options: dict[str, Any]
        if segments is not None:
            options = {"segments": segments}
        else:
            options = {
                "attention_mask": create_causal_mask(self.config, embeds, attention_mask, cache),
                "past_key_values": cache,
                "padded_attention": self.config._attn_implementation,
                "recorded": weights,
            }
        hidden = embeds
        for layer in self.layers:
            if states is not None:
                states.append(hidden)
            hidden = layer(hidden, position_embeddings=rotary, **options)
        hidden = self.norm(hidden)
        if states is not None:
            states.append(hidden)
        return hidden
