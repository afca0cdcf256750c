"""What transformers' ``generate`` needs to know about Keye: pixels once, and positions that carry a delta.

Legend: B rows, L tokens of a row, M images (or videos) of all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from keye_train.model.configuration import KeyeConfig

GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
VISION_KWARGS = ("pixel_values", "pixel_values_videos", *GRIDS)


@dataclass
class KeyeOutput(CausalLMOutputWithPast):
    """What ``forward`` returns; ``rope_deltas`` [B, 1] goes back in with the next token."""

    rope_deltas: Tensor | None = None


class KeyeGenerationMixin(GenerationMixin):
    """Decoding of padded batches with transformers' ``generate``: greedy, sampled, beams, several answers a prompt.

    The state travels in the arguments, never in the module, so that calls may interleave.
    """

    config: KeyeConfig

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of the next step: the tokens that the cache lacks, and the pixels that belong to them.

        Raises:
            ValueError: the cache was filled before, and positions cannot be told from what is given.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        last = slice(None) if next_sequence_length is None else slice(-next_sequence_length, None)
        inputs: dict[str, Any] = {
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "output_attentions": kwargs.get("output_attentions"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
        }
        if inputs_embeds is not None and is_first_iteration:
            inputs["inputs_embeds"] = inputs_embeds[:, last]
            new = inputs["inputs_embeds"].shape[1]
        else:
            inputs["input_ids"] = input_ids[:, last]
            new = inputs["input_ids"].shape[1]
        vision = {name: kwargs[name] for name in VISION_KWARGS if kwargs.get(name) is not None}
        position_ids = kwargs.get("position_ids")
        if position_ids is not None and position_ids.dim() == 3:
            inputs["position_ids"] = position_ids[..., -new:]  # the user's; those of ``generate`` have one axis
        elif past and kwargs.get("rope_deltas") is not None:
            inputs["rope_deltas"] = kwargs["rope_deltas"]
        elif past:
            inputs |= self._continued_positions(input_ids, past, new, attention_mask, vision)
        if past == 0:
            return inputs | vision
        return inputs | (_after_cache(self.config, input_ids, past, vision) if is_first_iteration else {})

    def _continued_positions(
        self, input_ids: Tensor, past: int, new: int, attention_mask: Tensor | None, vision: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Positions of new tokens behind a cache of an earlier call, from the whole sequence."""
        if input_ids.shape[1] != past + new:
            raise ValueError(
                f"the cache holds {past} tokens and input_ids has {input_ids.shape[1]}: give the whole sequence with "
                "all its grids, or rope_deltas, or position_ids of three axes (prefill_chunk_size is not supported)"
            )
        model: Any = self
        grids = {name: vision[name] for name in GRIDS if name in vision}
        positions, deltas = model.get_rope_index(input_ids, attention_mask=attention_mask, **grids)
        return {"position_ids": positions[..., past:], "rope_deltas": deltas}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["rope_deltas"] = outputs.rope_deltas
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Repeat each prompt ``expand_size`` times, and its images and videos with it."""
        vision = {name: kwargs.pop(name) for name in VISION_KWARGS if kwargs.get(name) is not None}
        if vision and expand_size > 1:
            if input_ids is None:
                raise ValueError("several sequences per prompt need input_ids, which tell whose images are whose")
            vision = _repeated(self.config, input_ids, expand_size, vision)
        parent: Any = super()
        input_ids, kwargs = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | vision


def _openings(config: KeyeConfig, input_ids: Tensor, kind: str) -> Tensor:
    """Row and column of the first pad token of each image or video, in order: [M, 2]."""
    pad = config.image_token_id if kind == "image" else config.video_token_id
    opened = (input_ids[:, :-1] == config.vision_start_token_id) & (input_ids[:, 1:] == pad)
    return opened.nonzero() + torch.tensor([0, 1], device=input_ids.device)


def _by_kind(
    config: KeyeConfig, input_ids: Tensor, vision: dict[str, Tensor]
) -> list[tuple[dict[str, Tensor], str, Tensor, Tensor]]:
    """For images and for videos, where there are any: what has a row for each item, the name of the pixels,
    the openings [M, 2] and the patches of each item [M].
    """
    found = []
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = vision.get(f"{kind}_grid_thw")
        if grids is None:
            continue
        places = _openings(config, input_ids, kind)
        if len(places) != len(grids):
            raise ValueError(f"input_ids opens {len(places)} {kind}s, but {kind}_grid_thw has {len(grids)} rows")
        items = {f"{kind}_grid_thw": grids}
        if kind == "video" and "second_per_grid_ts" in vision:
            items["second_per_grid_ts"] = vision["second_per_grid_ts"]
        found.append((items, pixels, places.to(grids.device), grids.prod(dim=1)))
    return found


def _repeated(config: KeyeConfig, input_ids: Tensor, times: int, vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """``vision`` of a batch in which every row stands ``times`` times in a row: all items of a row, then again."""

    def repeat(values: Tensor, sizes: Tensor) -> Tensor:
        parts = torch.as_tensor(values).split(sizes.tolist())
        return torch.cat([part for part in parts for _ in range(times)])

    repeated: dict[str, Tensor] = {}
    for items, pixels, places, patches in _by_kind(config, input_ids, vision):
        rows = places[:, 0]
        for name, values in items.items():
            repeated[name] = repeat(values, rows.bincount(minlength=len(input_ids)))
        if pixels in vision:
            sizes = patches.new_zeros(len(input_ids)).index_add(0, rows, patches)
            repeated[pixels] = repeat(vision[pixels], sizes)
    return vision | repeated


def _after_cache(config: KeyeConfig, input_ids: Tensor, past: int, vision: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixels and grids of the images and videos that open behind the ``past`` tokens of the cache."""
    left: dict[str, Tensor] = {}
    for items, pixels, places, patches in _by_kind(config, input_ids, vision):
        new = places[:, 1] >= past
        if bool(new.any()) and pixels in vision:
            left[pixels] = vision[pixels][new.repeat_interleave(patches).to(vision[pixels].device)]
            rows = {name: torch.as_tensor(values) for name, values in items.items()}
            left |= {name: values[new.to(values.device)] for name, values in rows.items()}
    return left
