"""What transformers' ``generate`` needs to know about Keye: pixels once, and positions that carry a delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

VISION_KWARGS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")


@dataclass
class KeyeOutput(CausalLMOutputWithPast):
    """What ``forward`` returns; ``rope_deltas`` [B, 1] goes back in with the next token."""

    rope_deltas: Tensor | None = None


class KeyeGenerationMixin(GenerationMixin):
    """Greedy and sampled decoding of padded batches; the state travels in the arguments, never in the module."""

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
        """Inputs of the next step: the tokens that the cache lacks, and pixels in the first step only.

        ``position_ids`` made by ``generate`` are one-dimensional text positions, so they are left out; ``forward``
        makes its own.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, past:],
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }
        if past:
            return inputs | {"rope_deltas": kwargs["rope_deltas"]}
        return inputs | {name: kwargs[name] for name in VISION_KWARGS if kwargs.get(name) is not None}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["rope_deltas"] = outputs.rope_deltas
        return model_kwargs

    def _expand_inputs_for_generation(self, expand_size: int = 1, *args: Any, **kwargs: Any) -> Any:
        # Pixels of all rows lie in one packed tensor, which a repeat along its first axis would scramble.
        if expand_size > 1 and any(kwargs.get(name) is not None for name in VISION_KWARGS):
            raise ValueError(
                "several sequences per prompt are not supported with images or videos: use num_beams=1 and "
                "num_return_sequences=1, and repeat the prompt in the batch"
            )
        return super()._expand_inputs_for_generation(expand_size, *args, **kwargs)  # type: ignore[misc]
