"""Promise: what a medium costs is known from its header, whatever a message asks of it; budgets are never exceeded."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_inputs import flat_frames, image_bytes, toy_tokenizer, video_bytes

from keye_train.model import KeyeProcessor
from keye_train.model.media_options import MediaOptions, MediaRequest, media_options, time_range
from keye_train.model.messages import Medium
from keye_train.model.positions import grid_tokens
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

SMALL = ResolutionSettings(
    image_min_tokens=2,
    image_max_tokens=30,
    video_frame_min_tokens=2,
    video_frame_max_tokens=9,
    video_max_tokens=60,
    video_max_frames=20,
)
PROCESSOR = KeyeProcessor.from_resolution(toy_tokenizer(), SMALL)
PIXELS = st.integers(400, 40_000)
SIDES = st.integers(1, 400)

IMAGE_OPTIONS = st.one_of(
    st.fixed_dictionaries({}, optional={"min_pixels": PIXELS, "max_pixels": PIXELS}),
    st.fixed_dictionaries({"resized_height": SIDES, "resized_width": SIDES}),
)
VIDEO_OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "min_pixels": PIXELS,
        "max_pixels": PIXELS,
        "total_pixels": st.integers(784, 100_000),
        "fps": st.floats(0.2, 30),
        "nframes": st.integers(1, 30),
        "min_frames": st.integers(1, 30),
        "max_frames": st.integers(1, 30),
        "video_start": st.floats(0, 3),
        "video_end": st.floats(0.1, 5),
    },
)


@cache
def clip(frames: int, fps: int) -> bytes:
    return video_bytes(flat_frames(frames), fps)


def agree(kind: MediaKind, source: Any, options: dict[str, Any]) -> MediaRequest | None:
    """Header and decoder agree, on the cost or on the fault; the cost where there is one."""
    fault, request = "", None
    try:
        request = Medium(kind, source, media_options(options, kind)).request(SMALL)
        assert request.tokens > 0
    except SampleError as error:
        fault, request = str(error), None
    try:
        pixels = Medium(kind, source, media_options(options, kind)).pixels(SMALL)
    except SampleError as error:
        assert str(error) == fault  # noqa: PT017
        return None
    assert request is not None, fault
    assert pixels.grid == request.grid
    assert len(pixels.patches) == 4 * request.tokens
    assert pixels.seconds_per_grid == request.seconds_per_grid
    return request


@settings(max_examples=80, deadline=None)
@given(width=SIDES, height=SIDES, options=IMAGE_OPTIONS)
def test_the_cost_of_an_image_is_foretold(width: int, height: int, options: dict[str, Any]) -> None:
    request = agree(MediaKind.image, image_bytes(Image.new("L", (width, height))), options)
    if request is not None:
        assert request.tokens <= max(
            1, options.get("max_pixels", max(30 * 784, options.get("min_pixels", 0) + 784)) // 784
        )


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(1, 31), fps=st.sampled_from([2, 10, 25]), options=VIDEO_OPTIONS)
def test_the_cost_of_a_video_is_foretold(frames: int, fps: int, options: dict[str, Any]) -> None:
    request = agree(MediaKind.video, clip(frames, fps), options)
    if request is not None:
        assert request.tokens <= options.get("total_pixels", 60 * 784) // 784
        assert request.grid[0] <= max(
            options.get("max_frames", 20), options.get("nframes", 0), options.get("min_frames", 0)
        )
        assert all(0 <= index < frames for index in request.frame_indices)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), fps=st.floats(0.5, 30), options=VIDEO_OPTIONS)
def test_the_cost_of_a_list_of_frames_is_foretold(count: int, fps: float, options: dict[str, Any]) -> None:
    frames = [Image.new("RGB", (64, 48), (9 * i % 256, 0, 0)) for i in range(count)]
    request = agree(MediaKind.video, frames, {**options, "fps": fps})
    if request is not None:
        assert request.tokens <= options.get("total_pixels", 60 * 784) // 784


def test_all_frames_of_a_list_are_taken_where_they_fit() -> None:
    frames = [Image.new("RGB", (64, 48))] * 7
    request = Medium(MediaKind.video, frames, MediaOptions(fps=0.5)).request(SMALL)
    assert (request.grid[0], request.frame_indices, request.seconds_per_grid) == (7, list(range(7)), 2.0)


@settings(max_examples=15, deadline=None)
@given(
    images=st.lists(st.tuples(st.integers(10, 300), st.integers(10, 300)), max_size=3),
    frames=st.integers(2, 20),
    words=st.text(max_size=12),
)
def test_the_tokens_of_a_conversation_are_foretold(images: list[tuple[int, int]], frames: int, words: str) -> None:
    content: list[dict[str, Any]] = [{"type": "image", "image": image_bytes(Image.new("L", size))} for size in images]
    content += [{"type": "text", "text": words}, {"type": "video", "video": clip(frames, 10), "max_pixels": 3136}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": words}]
    batch = PROCESSOR.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert PROCESSOR.count_tokens(messages) == batch["input_ids"].shape[1]


def test_options_change_the_budgets_of_both_reports() -> None:
    photo = MediaInfo(MediaKind.image, 6000, 6000)
    assert MediaRequest.of(photo, ResolutionSettings()).tokens == 128 * 128
    assert MediaRequest.of(photo, ResolutionSettings(image_max_tokens=20_480)).tokens == 143 * 143
    assert MediaRequest.of(photo, ResolutionSettings(), MediaOptions(max_pixels=100 * 784)).tokens == 100
    film = MediaInfo(MediaKind.video, 1920, 1080, 30 * 7200, 30.0)
    first = MediaRequest.of(film, ResolutionSettings())
    assert (first.grid[0], grid_tokens(first.grid) <= 24_576) == (24_576 // 128, True)
    second = ResolutionSettings(video_frame_min_tokens=48, video_max_tokens=75_000, video_max_frames=1562)
    longer = MediaRequest.of(film, second)
    assert (longer.grid[0], longer.tokens <= 75_000) == (75_000 // 48, True)
    assert MediaRequest.of(film, second, MediaOptions(nframes=10)).grid[0] == 10
    assert MediaRequest.of(film, second, MediaOptions(total_pixels=480 * 784)).tokens <= 480


def test_a_size_that_is_asked_for_replaces_the_own_one() -> None:
    photo, resolution = MediaInfo(MediaKind.image, 640, 480), ResolutionSettings()
    options = MediaOptions(resized_height=90, resized_width=141)
    assert MediaRequest.of(photo, resolution, options).grid == (1, 6, 10)
    limited = replace(resolution, image_max_tokens=4)
    assert MediaRequest.of(photo, limited, options).tokens <= 4


def test_a_time_range_is_the_published_one() -> None:
    assert time_range(100, 10.0, 1.05, 3.0) == (11, 30)
    assert time_range(100, 10.0, None, 99.0) == (0, 99)
    for start, end in ((3.0, 2.0), (20.0, None), (1.0, 1.0)):
        with pytest.raises(SampleError, match="holds no frames"):
            time_range(100, 10.0, start, end)
