"""The whole model: patches and tokens in, losses (training) or logits (inference) out.

Legend: T packed tokens, K labelled tokens, P patches, B rows, L tokens of a row, V vocabulary, W model width.

Two ways through the same modules:

* ``forward_packed``: training. Many samples in one row, isolated from each other, one loss per labelled token.
* ``forward``: the published interface. A padded batch, optionally with a cache; ``generate`` uses it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from keye_train.model.attention import PACKED_ATTENTION, Segments
from keye_train.model.configuration import KeyeConfig
from keye_train.model.generation import KeyeGenerationMixin, KeyeOutput
from keye_train.model.initialization import initialize_module
from keye_train.model.language import KeyeTextModel, padded_causal_mask
from keye_train.model.loss import LMHead
from keye_train.model.packed import IGNORE_INDEX, PackedInputs, VisionInputs
from keye_train.model.positions import rope_index
from keye_train.model.projector import Projector
from keye_train.model.vision import VisionTower, placeholder_image

PatchesAndGrids = tuple[Tensor | None, Tensor | None]


class KeyeForConditionalGeneration(PreTrainedModel, KeyeGenerationMixin):
    """Keye-VL with the published key names: ``visual``, ``mlp_AR``, ``model``, ``lm_head``."""

    config_class = KeyeConfig
    config: KeyeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen3DecoderLayer", "EncoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KeyeConfig) -> None:
        config._attn_implementation = PACKED_ATTENTION
        super().__init__(config)
        self.visual = VisionTower(config.vision)
        self.mlp_AR = Projector(config.vision.hidden_size, config.hidden_size)
        self.model = KeyeTextModel(config)
        self.lm_head = LMHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config.initializer_range)

    # ------------------------------------------------------------------------------------------------ training

    def forward_packed(self, inputs: PackedInputs) -> Tensor:
        """Loss of each labelled token of a pack.

        The same modules run whatever the pack holds, so that no rank waits for another in a collective: without
        vision a placeholder image goes through tower and projector and enters with weight 0, and a pack without
        tokens is run as one token without a label.

        Args:
            inputs: a pack on the model's device (``vision.grid_thw`` on the CPU).

        Returns:
            [K] float32, in the order of ``inputs.loss_rows``; the caller adds up and divides.
        """
        assert self.config._attn_implementation == PACKED_ATTENTION, "another attention would mix the samples"
        if inputs.input_ids.shape[0] == 0:
            inputs = _one_token(inputs)
        embeds = self.model.embed_tokens(inputs.input_ids)
        if inputs.vision.pixel_patches.shape[0]:
            features = self.vision_features(inputs.vision).to(embeds.dtype)
            embeds = embeds.index_copy(0, inputs.vision_rows, features)
        else:
            features = self.vision_features(placeholder_image(embeds))
            embeds = embeds + 0.0 * features.sum().to(embeds.dtype)
        hidden = self.model(
            embeds[None],
            inputs.position_ids[:, None],
            segments=Segments(inputs.cu_seqlens, inputs.max_seqlen),
        )
        return self.lm_head(hidden[0].index_select(0, inputs.loss_rows), inputs.loss_targets)

    def vision_features(self, vision: VisionInputs) -> Tensor:
        """Tokens of all images and videos of a pack: [P / 4, W], in the order of the grids."""
        return self.mlp_AR(self.visual(vision))

    # ----------------------------------------------------------------------------------------------- inference

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        packed: PackedInputs | None = None,
    ) -> KeyeOutput | Tensor:
        """Logits of a padded batch; with ``packed`` alone, ``forward_packed`` (engines call modules, not methods).

        Args:
            input_ids: [B, L] int64, only the new tokens where there is a cache.
            attention_mask: [B, L'] of all tokens with those in the cache; None: no padding.
            position_ids: [3, B, L]; None: made from ids, grids and mask, or from ``rope_deltas`` after the prefill.
            past_key_values: cache, extended in place.
            inputs_embeds: [B, L, W] in place of ``input_ids``; then ``position_ids`` is needed too.
            labels: [B, L] not shifted, -100 ignored; adds the mean loss over all labelled tokens.
            use_cache: return a cache.
            pixel_values: [N, 3, 14, 14] normalised floats (or uint8 levels) of all images, in raster order.
            pixel_values_videos: the same for all videos.
            image_grid_thw, video_grid_thw: [images, 3] and [videos, 3] int64.
            second_per_grid_ts: [videos] seconds between time steps; None: 1.
            rope_deltas: [B, 1], from the output of the prefill; needed with a filled cache.
            logits_to_keep: last positions whose logits are wanted; 0: all.
            return_dict: must be true.
            packed: a training pack; everything else is left out.

        Raises:
            ValueError: inputs that contradict each other.
        """
        if packed is not None:
            return self.forward_packed(packed)
        if not return_dict:
            raise ValueError("return_dict=False is not supported: read the fields of the output")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        embeds = self._place_vision(embeds, input_ids, images, videos)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        length = embeds.shape[1]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            if past == 0 and input_ids is not None:
                position_ids, rope_deltas = self._positions(
                    input_ids, attention_mask, image_grid_thw, video_grid_thw, second_per_grid_ts
                )
            elif rope_deltas is not None:
                places = torch.arange(past, past + length, device=embeds.device)
                position_ids = (places + rope_deltas.to(embeds.device)).expand(3, -1, -1)
            else:
                raise ValueError("a filled cache needs rope_deltas (from the prefill's output) or position_ids")
        mask = padded_causal_mask(attention_mask, length, past + length, embeds.device)
        hidden = self.model(embeds, position_ids, mask=mask, cache=past_key_values)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise ValueError("labels need the logits of all positions: drop logits_to_keep")
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
            )
        return KeyeOutput(loss=loss, logits=logits, past_key_values=past_key_values, rope_deltas=rope_deltas)

    def _place_vision(
        self, embeds: Tensor, input_ids: Tensor | None, images: PatchesAndGrids, videos: PatchesAndGrids
    ) -> Tensor:
        """``embeds`` [B, L, W] with the features of images and videos in the places of their pad tokens."""
        tokens = (self.config.image_token_id, self.config.video_token_id)
        given = [
            (patches, grids, token)
            for (patches, grids), token in zip((images, videos), tokens, strict=True)
            if patches is not None and grids is not None
        ]
        if sum(patches is not None for patches, _ in (images, videos)) != len(given) or (given and input_ids is None):
            raise ValueError("pixel values need input_ids and the grid_thw of their kind")
        if not given or input_ids is None:
            return embeds
        vision = VisionInputs.build(
            torch.cat([patches for patches, _, _ in given]), torch.cat([grids.cpu() for _, grids, _ in given])
        )
        features = self.vision_features(vision.to(embeds.device)).to(embeds.dtype)
        parts = features.split([len(patches) // 4 for patches, _, _ in given])
        flat = embeds.flatten(0, 1)
        for (_, _, token), part in zip(given, parts, strict=True):
            rows = (input_ids.flatten() == token).nonzero()[:, 0]
            if len(rows) != len(part):
                raise ValueError(f"{len(rows)} pad tokens of id {token}, but the pixels make {len(part)} tokens")
            flat = flat.index_copy(0, rows, part)
        return flat.view_as(embeds)

    def _positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_grid_thw: Tensor | None,
        video_grid_thw: Tensor | None,
        second_per_grid_ts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Positions [3, B, L] and deltas [B, 1] of a prompt."""
        config = self.config
        return rope_index(
            input_ids,
            attention_mask,
            image_grid_thw,
            video_grid_thw,
            second_per_grid_ts,
            vision_start_id=config.vision_start_token_id,
            image_pad_id=config.image_token_id,
            video_pad_id=config.video_token_id,
            tokens_per_second=config.vision.tokens_per_second,
        )


def _one_token(empty: PackedInputs) -> PackedInputs:
    """A stand-in for a pack without samples: one unlabelled token."""
    device = empty.input_ids.device
    return replace(
        empty,
        input_ids=torch.zeros(1, dtype=torch.int64, device=device),
        labels=torch.full((1,), IGNORE_INDEX, device=device),
        position_ids=torch.zeros(3, 1, dtype=torch.int64, device=device),
        cu_seqlens=torch.arange(2, dtype=torch.int32, device=device),
        max_seqlen=1,
    )
