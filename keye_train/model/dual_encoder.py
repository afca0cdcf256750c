"""Stage 0: the vision tower and a text tower learn to agree on images and captions (SigLIP).

Legend: B image-caption pairs, L caption tokens, C width of the vision tower (both towers' vectors have it), P patches.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from keye_train.model.attention import Segments
from keye_train.model.caption import CaptionDecoder
from keye_train.model.configuration import KeyeConfig
from keye_train.model.initialization import initialize_weights
from keye_train.model.packed import ContrastiveInputs
from keye_train.model.vision import Encoder, VisionTower
from keye_train.settings import CaptionDecoderSettings, TextTowerSettings

TEXT_NORM_EPS = 1e-6
INITIAL_LOGIT_SCALE = math.log(10.0)  # SigLIP paper, section 3.2: temperature 10 and bias -10
INITIAL_LOGIT_BIAS = -10.0


class ContrastiveOutput(NamedTuple):
    """Vectors of a pack's pairs, and the two numbers that turn similarity into a logit."""

    image_embeds: Tensor  # [B, C] float32, length 1
    text_embeds: Tensor  # [B, C] float32, length 1
    logit_scale: Tensor  # [1] float32, logarithm of the temperature
    logit_bias: Tensor  # [1] float32
    caption_losses: Tensor | None = None  # [B] float32: mean loss of each caption's tokens, with a caption decoder


class TextEmbeddings(nn.Module):
    """Token plus learned position."""

    def __init__(self, settings: TextTowerSettings) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(settings.vocab_size, settings.hidden_size)
        self.position_embedding = nn.Embedding(settings.max_tokens, settings.hidden_size)

    def forward(self, text_ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, width]."""
        places = torch.arange(text_ids.shape[1], device=text_ids.device)
        return self.token_embedding(text_ids) + self.position_embedding(places)


class TextTower(nn.Module):
    """SigLIP's text tower: bidirectional over all L places, padding included, and read at the last place."""

    def __init__(self, settings: TextTowerSettings, out_width: int) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(settings)
        self.encoder = Encoder(
            settings.num_hidden_layers,
            settings.hidden_size,
            settings.intermediate_size,
            settings.num_attention_heads,
            TEXT_NORM_EPS,
        )
        self.final_layer_norm = nn.LayerNorm(settings.hidden_size, eps=TEXT_NORM_EPS)
        self.head = nn.Linear(settings.hidden_size, out_width)

    def forward(self, text_ids: Tensor) -> Tensor:
        """Captions [B, L], right-padded to ``max_tokens`` as SigLIP was trained -> [B, C]."""
        count, length = text_ids.shape
        hidden = self.embeddings(text_ids).flatten(0, 1)
        hidden = self.encoder(hidden, Segments.equal(count, length, hidden.device))
        last = hidden.unflatten(0, (count, length))[:, -1]
        return self.head(self.final_layer_norm(last))


class DualEncoder(nn.Module):
    """Two towers, and a caption decoder where the stage has a caption loss.

    ``visual`` has the names that the language stages use; the rest stays behind after Stage 0.
    """

    def __init__(
        self, config: KeyeConfig, text: TextTowerSettings, captions: CaptionDecoderSettings | None = None
    ) -> None:
        """Random weights from torch's generator.

        Args:
            config: gives the shape of the vision tower; it is kept, with ``text_tower``, for the export.
            text: shape of the text tower.
            captions: shape of the caption decoder; None: there is none.
        """
        super().__init__()
        self.config = KeyeConfig(**config.to_dict())
        self.config.architectures = ["DualEncoder"]
        self.config.text_tower = asdict(text)
        self.config.caption_decoder = None if captions is None else asdict(captions)
        self.visual = VisionTower(config.vision)
        self.text_model = TextTower(text, config.vision.hidden_size)
        self.logit_scale = nn.Parameter(torch.tensor([INITIAL_LOGIT_SCALE]))
        self.logit_bias = nn.Parameter(torch.tensor([INITIAL_LOGIT_BIAS]))
        initialize_weights(self, config.initializer_range)
        # Last, so that both towers begin alike with and without it.
        self.caption_decoder: CaptionDecoder | None = None
        if captions is not None:
            self.caption_decoder = CaptionDecoder(captions, text.vocab_size, config.vision.hidden_size)
            initialize_weights(self.caption_decoder, captions.initializer_range)

    def forward(self, inputs: ContrastiveInputs) -> ContrastiveOutput:
        """Vectors of all pairs of a pack, at least one, and the losses of their captions where there is a decoder.

        The two scalars are handed out as copies: ZeRO-3 takes the parameters away again after this call.
        """
        hidden = self.visual(inputs.vision)
        images = self.visual.pool(hidden, inputs.vision)
        texts = self.text_model(inputs.text_ids)
        captions = None
        if self.caption_decoder is not None and inputs.captions is not None:
            captions = self.caption_decoder(hidden, inputs.captions, len(inputs.text_ids))
        return ContrastiveOutput(
            F.normalize(images.float(), dim=-1),
            F.normalize(texts.float(), dim=-1),
            self.logit_scale.float().clone(),
            self.logit_bias.float().clone(),
            captions,
        )
