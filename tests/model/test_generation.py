"""Promises: ``generate`` gives the published greedy tokens, also for a padded batch; each module has its parameters."""

from __future__ import annotations

from typing import Any

import golden
import pytest
import torch

from keye_train.model import KeyeConfig, KeyeForConditionalGeneration, module_parameters

MEDIA = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
STEPS = 6


def greedy(model: KeyeForConditionalGeneration, **inputs: torch.Tensor) -> list[list[int]]:
    generate: Any = model.generate
    tokens = generate(
        **inputs, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    return golden.tiny_model().eval()


@pytest.mark.parametrize("sample", golden.SAMPLES)
def test_one_prompt(model: KeyeForConditionalGeneration, sample: str) -> None:
    assert greedy(model, **golden.call_arguments(sample)) == [golden.table("greedy_with_cache.json")[sample]["greedy"]]


def test_left_padded_batch(model: KeyeForConditionalGeneration) -> None:
    parts = [golden.call_arguments(sample) for sample in golden.SAMPLES]
    longest = max(part["input_ids"].shape[1] for part in parts)
    rows = [torch.nn.functional.pad(part["input_ids"][0], (longest - part["input_ids"].shape[1], 0)) for part in parts]
    masks = [
        torch.nn.functional.pad(torch.ones_like(part["input_ids"][0]), (longest - part["input_ids"].shape[1], 0))
        for part in parts
    ]
    media = {name: torch.cat([part[name] for part in parts if name in part]) for name in MEDIA}
    tokens = greedy(model, input_ids=torch.stack(rows), attention_mask=torch.stack(masks), **media)
    assert tokens == [golden.table("greedy_with_cache.json")[sample]["greedy"] for sample in golden.SAMPLES]


def test_without_a_cache(model: KeyeForConditionalGeneration) -> None:
    arguments = golden.call_arguments("image_and_video")
    generate: Any = model.generate
    tokens = generate(
        **arguments, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert tokens[0, -2:].tolist() == golden.table("greedy_with_cache.json")["image_and_video"]["greedy"][:2]


class TestRefusals:
    def test_several_sequences_per_picture(self, model: KeyeForConditionalGeneration) -> None:
        generate: Any = model.generate
        with pytest.raises(ValueError, match="num_beams=1"):
            generate(**golden.call_arguments("image"), num_beams=2, max_new_tokens=1, pad_token_id=0)

    def test_filled_cache_without_deltas(self, model: KeyeForConditionalGeneration) -> None:
        output = model(input_ids=torch.tensor([[1, 2]]), use_cache=True)
        with pytest.raises(ValueError, match="rope_deltas"):
            model(input_ids=torch.tensor([[3]]), past_key_values=output.past_key_values)

    def test_pixels_without_grids(self, model: KeyeForConditionalGeneration) -> None:
        arguments = golden.call_arguments("image")
        del arguments["image_grid_thw"]
        with pytest.raises(ValueError, match="grid_thw"):
            model(**arguments)


def test_stage_1_trains_the_projector_of_the_8b_model() -> None:
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(KeyeConfig())
    sizes = {name: sum(p.numel() for _, p in pairs) for name, pairs in module_parameters(model).items()}
    assert sizes["projector"] == 40_119_040
    assert sizes["language"] == 7_568_405_504 + 622_329_856
    assert sizes["vision"] == 465_974_336 - 32768 * 1152 - sum(
        p.numel() for p in model.visual.vision_model.head.parameters()
    )
