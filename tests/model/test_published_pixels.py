"""Promise: ``published=True`` gives the recorded ids and pixels; the default mends each fault, shown both ways."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toy_inputs import flat_frames, image_bytes, synthetic_image, toy_tokenizer, video_bytes

from keye_train.model import KeyeImageProcessor, KeyeProcessor
from keye_train.model.positions import grid_tokens
from keye_train.model.published_pixels import fetch_image, fetch_video, resize_frame, video_patches

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = Path(__file__).parents[3] / "shared" / "keye-vl-8b-preview"
LIMITS = (3136, 1_003_520)  # preprocessor_config.json of the published folder
IMAGES = json.loads((GOLDEN / "images.json").read_text())
VIDEOS = {row["name"]: row for row in json.loads((GOLDEN / "video_sampling.json").read_text()) if "name" in row}
CHATS = [r for r in json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8")) if "add_generation_prompt" in r]


@cache
def recorded(file: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / file) as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor(KeyeImageProcessor(*LIMITS), toy_tokenizer())


def picture_of(row: dict[str, Any]) -> Image.Image:
    """The picture of a row of images.json in its mode."""
    levels = synthetic_image(row["H"], row["W"], row["k"])
    mode = row.get("mode", "RGB")
    y, x = np.ogrid[: row["H"], : row["W"]]
    alpha = ((9 * y + 4 * x) % 256).astype(np.uint8)
    forms = {"RGB": levels, "L": levels[..., 0], "RGBA": np.dstack([levels, alpha])}
    return Image.fromarray(forms[mode] if mode != "LA" else np.dstack([levels[..., 0], alpha]))


def assert_recorded(batch: Any, row: dict[str, Any], arrays: str) -> None:
    """Bit for bit: grid, the sha256 of all float32 values, and the recorded patches."""
    pixels = batch["pixel_values"]
    assert batch["image_grid_thw"].tolist() == [row["grid_thw"]]
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest() == row["sha256_float32"]
    levels = ((pixels + 1) * 127.5).round().to(torch.uint8).numpy()
    stored = recorded("images.npz")
    assert np.array_equal(levels[stored[f"{arrays}.patch_index"]], stored[f"{arrays}.patches_u8"])


def ask(processor: KeyeProcessor, *content: dict[str, Any], **options: Any) -> Any:
    messages = [{"role": "user", "content": list(content)}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)


# ------------------------------------------------------------------------------------------ recorded numbers


@pytest.mark.parametrize("row", [r for r in IMAGES if "image_processor" in r], ids=lambda r: r["name"])
def test_images_equal_the_recorded_ones(processor: KeyeProcessor, row: dict[str, Any]) -> None:
    picture, name = picture_of(row), row["name"]
    alone = processor.image_processor(picture, published=True)
    assert_recorded(alone, row["image_processor"], f"{name}.processor")
    fetched = fetch_image(picture, {})
    assert [fetched.height, fetched.width] == row["utils_then_processor"]["utils_resized_hw"]
    assert hashlib.sha256(fetched.tobytes()).hexdigest() == row["utils_then_processor"]["utils_sha256_rgb"]
    pipeline = ask(processor, {"type": "image", "image": picture}, published=True)
    assert_recorded(pipeline, row["utils_then_processor"], f"{name}.pipeline")


@pytest.mark.parametrize("row", [r for r in IMAGES if "mode" in r or "override" in r], ids=lambda r: r["name"])
def test_modes_and_options_equal_the_recorded_ones(processor: KeyeProcessor, row: dict[str, Any]) -> None:
    if row["name"].endswith("processor_only"):
        batch = processor.image_processor(picture_of(row), published=True)
    else:
        item = {"type": "image", "image": picture_of(row), **row.get("override", {})}
        batch = ask(processor, item, published=True)
    assert_recorded(batch, row, row["name"])


def test_several_images_of_one_call_equal_the_recorded_ones(processor: KeyeProcessor) -> None:
    (row,) = (r for r in IMAGES if r["name"] == "several_in_one_call")
    batch = processor.image_processor([Image.fromarray(synthetic_image(*size)) for size in row["images"]])
    assert batch["image_grid_thw"].tolist() == row["image_grid_thw"]
    assert hashlib.sha256(batch["pixel_values"].numpy().tobytes()).hexdigest() == row["sha256_float32"]


@pytest.mark.parametrize("name", ["real_0", "real_1"])
def test_video_pixels_equal_the_recorded_ones(name: str) -> None:
    row, stored = VIDEOS[name], recorded("video_pixels.npz")
    frames = [synthetic_image(row["height"], row["width"], i % 11) for i in row["indices"]]
    patches, grid = video_patches([resize_frame(frame, *row["resized_hw"]) for frame in frames], *LIMITS)
    assert list(grid) == row["grid_thw"]
    # Another torch may round its float32 sums otherwise: two levels are within the recorded tolerance.
    apart = patches[stored[f"{name}.patch_index"]].astype(int) - stored[f"{name}.patches_u8"]
    assert np.abs(apart).max() <= 2
    assert abs(int(patches.sum()) - row["sum_u8"]) <= 1e-4 * row["sum_u8"]


def test_a_list_of_frames_equals_the_recorded_one() -> None:
    row = VIDEOS["list_of_5_frames_70x100"]
    frames, fps = fetch_video([Image.fromarray(synthetic_image(70, 100, i)) for i in range(5)], row["ele"])
    assert (len(frames), fps, list(frames[0].shape[:2])) == (row["n_out"], row["sample_fps"], row["resized_hw"])
    assert np.array_equal(frames[-1], frames[-2])


@pytest.fixture(scope="module")
def full_processor() -> KeyeProcessor:
    if not PUBLISHED.is_dir():
        pytest.skip(f"needs the tokenizer of Keye-VL-8B-Preview in {PUBLISHED}")
    loaded = KeyeProcessor.from_pretrained(PUBLISHED, local_files_only=True)
    assert (loaded.image_processor.min_pixels, loaded.image_processor.max_pixels) == LIMITS
    return loaded


def with_media(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of chat.json with real pictures and encoded videos for their descriptions."""

    def source(described: Any) -> Any:
        if "synthetic" in described:
            return Image.fromarray(synthetic_image(*described["synthetic"]))
        frames = [synthetic_image(*described["hw"], i % 11) for i in range(described["frames"])]
        return video_bytes(frames, int(described["fps"]))

    def item(content: dict[str, Any]) -> dict[str, Any]:
        return {k: source(v) if k in ("image", "image_url", "video") else v for k, v in content.items()}

    def told(content: Any) -> Any:
        return content if isinstance(content, str) else [item(part) for part in content]

    return [{**message, "content": told(message["content"])} for message in messages]


@pytest.mark.parametrize("number", range(len(CHATS)))
def test_conversations_equal_the_recorded_ones(full_processor: KeyeProcessor, number: int) -> None:
    row = CHATS[number]
    messages = with_media(row["messages"])
    options = {"add_generation_prompt": row["add_generation_prompt"]}
    assert full_processor.apply_chat_template(messages, **options) == row["text"]
    if row["text_with_add_vision_id"] is not None:
        assert (
            full_processor.apply_chat_template(messages, add_vision_id=True, **options)
            == row["text_with_add_vision_id"]
        )
    batch = full_processor.apply_chat_template(messages, tokenize=True, return_dict=True, published=True, **options)
    assert batch["input_ids"][0].tolist() == row["input_ids"]
    for name in ("image_grid_thw", "video_grid_thw"):
        assert batch.get(name, torch.zeros(0)).tolist() == row[name]
    assert batch.get("second_per_grid_ts", torch.zeros(0)).tolist() == pytest.approx(
        row["second_per_grid_ts"], rel=1e-6
    )


def test_a_batch_and_the_other_template_equal_the_recorded_ones(
    full_processor: KeyeProcessor,
) -> None:
    rows = json.loads((GOLDEN / "chat.json").read_text(encoding="utf-8"))
    (batch,) = (row for row in rows if "batch_of" in row)
    encoded = full_processor(text=batch["batch_of"])
    assert encoded["input_ids"].tolist() == batch["input_ids"]
    assert encoded["attention_mask"].tolist() == batch["attention_mask"]
    for row in (row for row in rows if "tokenizer_template" in row):
        tokenizer = full_processor.tokenizer
        written = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        assert written == row["text"]


# ------------------------------------------------------------------------------------- faults, both ways


def test_a_large_picture_is_resized_once_or_twice(processor: KeyeProcessor) -> None:
    (row,) = (r for r in IMAGES if r["name"] == "H1500_W1999_k3")
    item = {"type": "image", "image": image_bytes(picture_of(row))}
    assert_recorded(ask(processor, item), row["image_processor"], "H1500_W1999_k3.processor")
    assert_recorded(ask(processor, item, published=True), row["utils_then_processor"], "H1500_W1999_k3.pipeline")


def test_limits_of_a_call_and_of_a_message_are_honoured_or_dropped(processor: KeyeProcessor) -> None:
    picture = synthetic_image(280, 280)
    whole = processor.image_processor(picture)["image_grid_thw"]
    assert processor.image_processor(picture, max_pixels=4 * 784)["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert processor.image_processor(picture, max_pixels=4 * 784, published=True)["image_grid_thw"].equal(whole)
    large = {"type": "image", "image": synthetic_image(1400, 1400), "max_pixels": 2500 * 784}
    assert grid_tokens(ask(processor, large)["image_grid_thw"][0]) == 2500
    as_published = dict(large, image=Image.fromarray(large["image"]))
    assert grid_tokens(ask(processor, as_published, published=True)["image_grid_thw"][0]) <= 1280


def test_frames_without_a_rate_are_refused_or_taken_for_two_a_second(processor: KeyeProcessor) -> None:
    frames = np.stack(flat_frames(4))
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])
    with pytest.raises(Exception, match="fps=FRAMES PER SECOND"):
        processor(text=text, videos=[frames])
    assert processor(text=text, videos=[frames], fps=10)["second_per_grid_ts"].tolist() == pytest.approx([0.1])
    assert processor(text=text, videos=[frames], published=True)["second_per_grid_ts"].tolist() == [0.5]


def test_the_budget_of_a_video_holds_or_is_doubled(processor: KeyeProcessor) -> None:
    clip = video_bytes([synthetic_image(120, 120, i % 11) for i in range(16)])
    item = {"type": "video", "video": clip, "nframes": 8, "min_pixels": 784, "total_pixels": 16 * 784}
    assert grid_tokens(ask(processor, item)["video_grid_thw"][0]) <= 16
    assert grid_tokens(ask(processor, item, published=True)["video_grid_thw"][0]) == 32


def test_a_pad_in_a_text_stays_text_or_is_expanded(processor: KeyeProcessor) -> None:
    picture = {"type": "image", "image": Image.fromarray(synthetic_image(84, 84))}
    forged = {"type": "text", "text": "what does <|image_pad|> mean?"}
    pad = processor.image_token_id
    plain = ask(processor, picture, forged)["input_ids"][0]
    assert int((plain == pad).sum()) == 9
    assert "<|image_pad|> mean" in processor.tokenizer.decode(plain)
    with pytest.raises(IndexError):
        ask(processor, picture, forged, published=True)
    shifted = ask(processor, forged, picture, {"type": "image", "image": Image.new("RGB", (56, 56))}, published=False)
    assert int((shifted["input_ids"] == pad).sum()) == 9 + 4
    text = processor.apply_chat_template([{"role": "user", "content": [picture, forged]}])
    with pytest.raises(ValueError, match="2 times <|image_pad|>".replace("|", r"\|")):
        processor(text=text, images=[synthetic_image(84, 84)])
    given = ["unchanged <|vision_start|><|image_pad|><|vision_end|>"]
    processor(text=given, images=[synthetic_image(84, 84)])
    assert given == ["unchanged <|vision_start|><|image_pad|><|vision_end|>"]


def test_thin_arrays_are_read_or_refused(processor: KeyeProcessor) -> None:
    thin = synthetic_image(1, 60)
    assert processor.image_processor(thin)["image_grid_thw"].tolist() == [[1, 2, 120]]
    for picture in (thin, Image.fromarray(thin)):
        with pytest.raises(ValueError, match="1 channel"):
            processor.image_processor(picture, published=True)


def test_a_video_without_its_sampled_rate_keeps_true_seconds_or_not(processor: KeyeProcessor) -> None:
    clip = video_bytes([synthetic_image(60, 60, i % 11) for i in range(30)], fps=30)
    item = {"type": "video", "video": clip, "nframes": 6, "min_pixels": 3136, "max_pixels": 6272}
    for published in (False, True):
        assert ask(processor, item, published=published)["second_per_grid_ts"].tolist() == pytest.approx([1 / 6])
    text = processor.apply_chat_template([{"role": "user", "content": [item]}])
    frames, _ = fetch_video(clip, {"nframes": 6, "min_pixels": 3136, "max_pixels": 6272})
    assert processor(text=text, videos=[frames], published=True)["second_per_grid_ts"].tolist() == [0.5]
