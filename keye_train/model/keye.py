"""The whole model: patches and tokens in, losses (training) or logits (inference) out.

Legend: T packed tokens, K labelled tokens, P patches (N those of one kind of media), B rows, L tokens of a row, L'
tokens with those in the cache, H heads, V vocabulary, W model width.

Two ways through the same modules:

* ``forward_packed``: training. Many samples in one row, isolated from each other, one loss per labelled token.
* ``forward``: the published interface. A padded batch, optionally with a cache; ``generate`` uses it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from keye_train.model.attention import Segments
from keye_train.model.configuration import KeyeConfig
from keye_train.model.generation import KeyeGenerationMixin, KeyeOutput
from keye_train.model.initialization import initialize_module
from keye_train.model.language import KeyeTextModel
from keye_train.model.loss import LMHead
from keye_train.model.packed import IGNORE_INDEX, PackedInputs, VisionInputs
from keye_train.model.positions import rope_index
from keye_train.model.projector import Projector
from keye_train.model.vision import VisionTower, normalize_levels, placeholder_image

PatchesAndGrids = tuple[Tensor | None, Tensor | None]


class KeyeForConditionalGeneration(PreTrainedModel, KeyeGenerationMixin):
    """Keye-VL with the published key names: ``visual``, ``mlp_AR``, ``model``, ``lm_head``."""

    config_class = KeyeConfig
    config: KeyeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ["image", "video", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # ``num_items_in_batch``
    # ``attn_implementation`` chooses the language model's attention in padded batches. Packed rows and the vision
    # tower always go through ``packed_attention``, which alone keeps samples and images apart.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _no_split_modules = ["Qwen3DecoderLayer", "EncoderLayer"]  # noqa: RUF012
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: KeyeConfig) -> None:
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        rope_deltas: Tensor | None = None,
        cache_position: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        packed: PackedInputs | None = None,
    ) -> KeyeOutput | tuple[Any, ...] | Tensor:
        """Logits of a padded batch; with ``packed`` alone, ``forward_packed`` (engines call modules, not methods).

        Args:
            input_ids: [B, L] int64, only the new tokens where there is a cache.
            attention_mask: [B, L'] of all tokens with those in the cache; None: no padding.
            position_ids: [3, B, L], or [B, L] for the same on all axes; None: made from ids, grids and mask, or from
                ``rope_deltas`` after the prefill.
            past_key_values: cache, extended in place.
            inputs_embeds: [B, L, W] in place of ``input_ids``; then ``position_ids`` is needed too.
            labels: [B, L] not shifted, -100 ignored; adds the mean loss over all labelled tokens.
            use_cache: return a cache; None: as in the configuration, but none while training.
            output_attentions: return the weights of each layer, [B, H, L, L']; needs ``attn_implementation="eager"``.
            output_hidden_states: return the input of each layer and the last states, layers + 1 of [B, L, W].
            return_dict: False: a tuple of the fields that are there, loss first.
            pixel_values: [N, 3, 14, 14] normalised floats (or uint8 levels) of all images, in raster order.
            pixel_values_videos: the same for all videos.
            image_grid_thw, video_grid_thw: [images, 3] and [videos, 3] int64.
            rope_deltas: [B, 1], from the output of the prefill; needed with a filled cache.
            cache_position: [L] places of the new tokens in the cache; None: they follow what it holds.
            second_per_grid_ts: [videos] seconds between time steps; None: 1.
            logits_to_keep: last positions whose logits are wanted, or their numbers; 0: all.
            num_items_in_batch: the loss is the sum over labelled tokens divided by this; None: by their number.
            packed: a training pack; everything else is left out.

        Raises:
            ValueError: inputs that contradict each other.
        """
        if packed is not None:
            return self.forward_packed(packed)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        config = self.config
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        images, videos = (pixel_values, image_grid_thw), (pixel_values_videos, video_grid_thw)
        embeds = self._place_vision(embeds, input_ids, images, videos)
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        if position_ids is None:
            position_ids, rope_deltas = self._positions(
                embeds, input_ids, attention_mask, images[1], videos[1], second_per_grid_ts, rope_deltas,
                cache_position, past_key_values,
            )  # fmt: skip
        elif position_ids.dim() == 2:
            position_ids = position_ids.expand(3, -1, -1)
        states: list[Tensor] | None = [] if _wanted(output_hidden_states, config.output_hidden_states) else None
        weights: list[Tensor | None] | None = [] if _wanted(output_attentions, config.output_attentions) else None
        if weights is not None and config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs attn_implementation='eager', this is {config._attn_implementation!r}"
            )
        hidden = self.model(
            embeds,
            position_ids,
            attention_mask=attention_mask,
            cache=past_key_values,
            states=states,
            weights=weights,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[1] != labels.shape[1]:
                raise ValueError("labels need the logits of all positions: drop logits_to_keep")
            loss = _mean_loss(logits, labels, num_items_in_batch)
        output = KeyeOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=None if states is None else tuple(states),
            attentions=None if weights is None else tuple(weight for weight in weights if weight is not None),
            rope_deltas=rope_deltas,
        )
        return output if _wanted(return_dict, config.return_dict) else output.to_tuple()

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
        for patches, grids, token in given:
            if len(patches) != (cut := int(grids.prod(dim=1).sum())):
                raise ValueError(f"{len(patches)} patches for pad tokens of id {token}, but their grid_thw has {cut}")
        vision = VisionInputs.build(
            torch.cat([normalize_levels(patches) for patches, _, _ in given]),  # one kind may be levels, the other not
            torch.cat([grids.cpu() for _, grids, _ in given]),
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
        embeds: Tensor,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        image_grid_thw: Tensor | None,
        video_grid_thw: Tensor | None,
        second_per_grid_ts: Tensor | None,
        rope_deltas: Tensor | None,
        cache_position: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """Positions [3, B, L] of the new tokens and deltas [B, 1] for those that follow."""
        past = cache.get_seq_length() if cache is not None else 0
        if past == 0 and input_ids is not None:
            return self.get_rope_index(input_ids, image_grid_thw, video_grid_thw, second_per_grid_ts, attention_mask)
        if rope_deltas is None:
            raise ValueError(
                "a filled cache needs rope_deltas (from the prefill's output) or position_ids; inputs_embeds need "
                "position_ids"
            )
        if cache_position is None:
            cache_position = torch.arange(past, past + embeds.shape[1], device=embeds.device)
        return (cache_position + rope_deltas.to(embeds.device)).expand(3, -1, -1), rope_deltas

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Positions [3, B, L] and deltas [B, 1] of a prompt; see ``positions.rope_index``."""
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

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another output matrix in place, as ``resize_token_embeddings`` does; it stays an ``LMHead``."""
        assert isinstance(new_embeddings, nn.Linear)
        if not isinstance(new_embeddings, LMHead):
            with torch.device("meta"):
                head = LMHead(new_embeddings.in_features, new_embeddings.out_features)
            head.weight = new_embeddings.weight
            new_embeddings = head
        self.lm_head = new_embeddings


def _wanted(argument: bool | None, default: bool | None) -> bool:
    return bool(default if argument is None else argument)


def _mean_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """Cross entropy of ``logits`` [B, L, V] with the next ``labels`` [B, L], over all rows together."""
    predicted, targets = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    if num_items_in_batch is None:
        return F.cross_entropy(predicted, targets, ignore_index=IGNORE_INDEX)
    return F.cross_entropy(predicted, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_items_in_batch


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
