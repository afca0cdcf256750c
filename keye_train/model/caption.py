"""The optional second loss of Stage 0: a small language model reads the caption off the vision tower (Kimi-VL, 2.1).

The contrastive loss sees an image as one vector; this one asks every patch for words. The decoder is built from the
parts of Keye itself: the projector's 2 x 2 merge, then Qwen3 layers over ``[image tokens][caption tokens]``, one causal
segment for each pair. It stays behind after Stage 0.

Legend: B image-caption pairs, P patches, C width of the vision tower, T image and caption tokens, K caption tokens.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor, nn

from keye_train.model.attention import Segments
from keye_train.model.configuration import KeyeConfig
from keye_train.model.language import KeyeTextModel
from keye_train.model.loss import LMHead
from keye_train.model.packed import PackedInputs
from keye_train.model.projector import Projector
from keye_train.settings import CaptionDecoderSettings


class CaptionDecoder(nn.Module):
    """Projector, a few decoder layers and an output matrix over the text tower's vocabulary."""

    def __init__(self, settings: CaptionDecoderSettings, vocab_size: int, vision_width: int) -> None:
        super().__init__()
        config = KeyeConfig(
            **asdict(settings), vocab_size=vocab_size, head_dim=settings.hidden_size // settings.num_attention_heads
        )
        self.projector = Projector(vision_width, settings.hidden_size)
        self.decoder = KeyeTextModel(config)
        self.lm_head = LMHead(settings.hidden_size, vocab_size)

    def forward(self, hidden: Tensor, captions: PackedInputs, pairs: int) -> Tensor:
        """Mean cross entropy of each pair's caption tokens: every caption counts the same, however long.

        Args:
            hidden: [P, C] states of the vision tower, in block order.
            captions: a pack with one sample for each pair; its ``vision`` is not looked at.
            pairs: B.

        Returns:
            [B] float32.
        """
        embeds = self.decoder.embed_tokens(captions.input_ids)
        embeds = embeds.index_copy(0, captions.vision_rows, self.projector(hidden).to(embeds.dtype))
        states = self.decoder(
            embeds[None],
            captions.position_ids[:, None],
            segments=Segments(captions.cu_seqlens, captions.max_seqlen),
        )
        losses = self.lm_head(states[0].index_select(0, captions.loss_rows), captions.loss_targets)
        totals = losses.new_zeros(pairs).index_add(0, captions.loss_samples, losses)
        lengths = losses.new_zeros(pairs).index_add(0, captions.loss_samples, torch.ones_like(losses))
        return totals / lengths
