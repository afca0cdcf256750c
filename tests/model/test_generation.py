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
    tokens = greedy(model, **padded(golden.SAMPLES))
    assert tokens == [golden.table("greedy_with_cache.json")[sample]["greedy"] for sample in golden.SAMPLES]


def test_without_a_cache(model: KeyeForConditionalGeneration) -> None:
    arguments = golden.call_arguments("image_and_video")
    generate: Any = model.generate
    tokens = generate(
        **arguments, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=False
    )
    assert tokens[0, -2:].tolist() == golden.table("greedy_with_cache.json")["image_and_video"]["greedy"][:2]


def padded(samples: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Prompts in one left-padded batch, with all their media."""
    parts = [golden.call_arguments(sample) for sample in samples]
    longest = max(part["input_ids"].shape[1] for part in parts)
    gaps = [(longest - part["input_ids"].shape[1], 0) for part in parts]
    pad = torch.nn.functional.pad
    rows = [pad(part["input_ids"][0], gap) for part, gap in zip(parts, gaps, strict=True)]
    masks = [pad(torch.ones_like(part["input_ids"][0]), gap) for part, gap in zip(parts, gaps, strict=True)]
    media = {name: torch.cat([part[name] for part in parts if name in part]) for name in MEDIA}
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks), **media}


class TestSeveralSequences:
    """Beams and several answers per prompt repeat the pixels of each prompt with it."""

    def test_beams_have_the_probability_they_claim(self, model: KeyeForConditionalGeneration) -> None:
        """Each beam, read in one go with its own pixels, has the log-probability that the search added up."""
        generate: Any = model.generate
        inputs = padded(golden.SAMPLES)
        out = generate(
            **inputs,
            num_beams=3,
            num_return_sequences=2,
            max_new_tokens=4,
            min_new_tokens=4,
            eos_token_id=None,
            pad_token_id=0,
            length_penalty=0.0,
            suppress_tokens=[500, 501, 502, 503, 504],  # untrained weights would open images of their own
            return_dict_in_generate=True,
            output_scores=True,
            do_sample=False,
        )
        start = inputs["input_ids"].shape[1]
        tokens = out.sequences[:, start:].unflatten(0, (-1, 2))
        scores = out.sequences_scores.unflatten(0, (-1, 2))
        for row, sample in enumerate(golden.SAMPLES):
            arguments = golden.call_arguments(sample)
            assert not torch.equal(tokens[row, 0], tokens[row, 1])
            for beam in range(2):
                ids = torch.cat([arguments["input_ids"], tokens[row, beam][None]], dim=1)
                logits = model(**arguments | {"input_ids": ids}).logits[0, -5:-1]
                probability = logits.log_softmax(-1).gather(1, tokens[row, beam][:, None]).sum()
                assert probability.item() == pytest.approx(scores[row, beam].item(), abs=1e-4), (sample, beam)

    def test_samples_follow_the_seed(self, model: KeyeForConditionalGeneration) -> None:
        generate: Any = model.generate
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            options = {"do_sample": True, "top_k": 20, "top_p": 0.95, "temperature": 0.6, "num_return_sequences": 3}
            drawn.append(
                generate(**padded(("image", "video")), **options, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
            )
        assert drawn[0].shape[0] == 6
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


class TestContinuation:
    """A conversation goes on behind the cache of its earlier turns."""

    @pytest.mark.parametrize("with_image", [False, True])
    def test_next_turn(self, model: KeyeForConditionalGeneration, with_image: bool) -> None:
        first = golden.call_arguments("image_and_video")
        generate: Any = model.generate
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 4}
        before = generate(**first, **options, return_dict_in_generate=True)
        more = golden.call_arguments("image" if with_image else "text")
        ids = torch.cat([before.sequences, more["input_ids"]], dim=1)
        media = {
            name: torch.cat([part[name] for part in (first, more) if name in part])
            for name in MEDIA
            if name in first or name in more
        }
        expected = generate(input_ids=ids, **media, **options)
        again = generate(input_ids=ids, **media, **options, past_key_values=before.past_key_values)
        assert torch.equal(again, expected)

    def test_what_the_cache_holds_must_be_told(self, model: KeyeForConditionalGeneration) -> None:
        output = model(**golden.call_arguments("image"), use_cache=True)
        generate: Any = model.generate
        with pytest.raises(ValueError, match="rope_deltas"):
            generate(
                input_ids=torch.tensor([[3, 4]]),
                attention_mask=torch.ones(1, output.past_key_values.get_seq_length() + 2, dtype=torch.int64),
                past_key_values=output.past_key_values,
                max_new_tokens=2,
                pad_token_id=0,
            )


@pytest.mark.parametrize("sample", ["image_and_video", "text"])
def test_from_embeddings(model: KeyeForConditionalGeneration, sample: str) -> None:
    """With three-axis positions, as they are needed wherever the ids are not at hand."""
    arguments = golden.call_arguments(sample)
    grids = {name: arguments[name] for name in MEDIA[1::2] + MEDIA[4:] if name in arguments}
    positions, _ = model.get_rope_index(arguments["input_ids"], **grids)
    images = arguments.get("pixel_values"), arguments.get("image_grid_thw")
    videos = arguments.get("pixel_values_videos"), arguments.get("video_grid_thw")
    ids = arguments["input_ids"]
    embeds = model._place_vision(model.model.embed_tokens(ids), ids, images, videos)
    generate: Any = model.generate
    tokens = generate(
        inputs_embeds=embeds,
        position_ids=positions,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert tokens[0, -STEPS:].tolist() == golden.table("greedy_with_cache.json")[sample]["greedy"]


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}])
def test_other_caches_and_drafts(model: KeyeForConditionalGeneration, options: dict[str, Any]) -> None:
    """A cache of fixed size, and tokens guessed ahead, change the way and not the answer."""
    generate: Any = model.generate
    for sample in golden.SAMPLES[:4]:
        tokens = generate(
            **golden.call_arguments(sample),
            **options,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tokens[0, -STEPS:].tolist() == golden.table("greedy_with_cache.json")[sample]["greedy"], sample


class TestRefusals:
    def test_several_sequences_of_other_media(self, model: KeyeForConditionalGeneration) -> None:
        generate: Any = model.generate
        arguments = golden.call_arguments("two_images")
        arguments["image_grid_thw"] = arguments["image_grid_thw"][:1]
        with pytest.raises(ValueError, match="opens 2 images, but image_grid_thw has 1"):
            generate(**arguments, num_beams=2, max_new_tokens=1, pad_token_id=0)

    def test_chunks_of_a_prompt(self, model: KeyeForConditionalGeneration) -> None:
        generate: Any = model.generate
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            generate(**golden.call_arguments("text"), prefill_chunk_size=4, max_new_tokens=1, pad_token_id=0)

    def test_filled_cache_without_deltas(self, model: KeyeForConditionalGeneration) -> None:
        output = model(input_ids=torch.tensor([[1, 2]]), use_cache=True)
        with pytest.raises(ValueError, match="rope_deltas"):
            model(input_ids=torch.tensor([[3]]), past_key_values=output.past_key_values)

    def test_pixels_without_grids(self, model: KeyeForConditionalGeneration) -> None:
        arguments = golden.call_arguments("image")
        del arguments["image_grid_thw"]
        with pytest.raises(ValueError, match="grid_thw"):
            model(**arguments)

    def test_patches_that_do_not_fill_the_grids(self, model: KeyeForConditionalGeneration) -> None:
        arguments = golden.call_arguments("image")
        arguments["pixel_values"] = arguments["pixel_values"][4:]
        with pytest.raises(ValueError, match="but their grid_thw has"):
            model(**arguments)


def test_levels_of_one_kind_beside_floats_of_the_other(model: KeyeForConditionalGeneration) -> None:
    arguments = golden.call_arguments("image_and_video")
    levels = ((arguments["pixel_values"] + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(**arguments | {"pixel_values": levels}).logits, model(**arguments).logits)


def test_stage_1_trains_the_projector_of_the_8b_model() -> None:
    with torch.device("meta"):
        model = KeyeForConditionalGeneration(KeyeConfig())
    sizes = {name: sum(p.numel() for _, p in pairs) for name, pairs in module_parameters(model).items()}
    assert sizes["projector"] == 40_119_040
    assert sizes["language"] == 7_568_405_504 + 622_329_856
    assert sizes["vision"] == 465_974_336 - 32768 * 1152 - sum(
        p.numel() for p in model.visual.vision_model.head.parameters()
    )
