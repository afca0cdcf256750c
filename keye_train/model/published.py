"""The size and sampling rules of the published inference code, quirks included.

Training follows the corrected rules of ``positions.py``. These are for comparing with the published pipeline and for
serving a model exactly as it is served there. Sizes are pixels, given and returned as (height, width).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Unpack

from keye_train.model.media_options import PIXELS_PER_TOKEN, MediaOptions, time_range
from keye_train.model.positions import MAX_ASPECT_RATIO, TOKEN_SIDE, spread_indices
from keye_train.sample import SampleError

FRAME_FACTOR = 2
DEFAULT_FPS = 2.0
DEFAULT_MIN_FRAMES = 4
DEFAULT_MAX_FRAMES = 768
VIDEO_MIN_PIXELS = 128 * PIXELS_PER_TOKEN
VIDEO_MAX_PIXELS = 768 * PIXELS_PER_TOKEN
VIDEO_TOTAL_PIXELS = int(128_000 * PIXELS_PER_TOKEN * 0.9)
IMAGE_MIN_PIXELS = 4 * PIXELS_PER_TOKEN
IMAGE_MAX_PIXELS = 16_384 * PIXELS_PER_TOKEN


@dataclass(frozen=True)
class VideoSampling:
    """Which frames the published code looks at, and how large."""

    indices: list[int]
    sample_fps: float
    height: int  # pixels, before the image processor's own resize
    width: int


def published_utils_resize(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Size that the utility package resizes to before the image processor does.

    Raises:
        ValueError: sides that differ by more than 200 : 1.
    """
    _check_aspect_ratio(height, width)
    rows, columns = max(1, round(height / TOKEN_SIDE)), max(1, round(width / TOKEN_SIDE))
    return _within_budget(height, width, rows, columns, min_pixels, max_pixels, least=1)


def published_processor_resize(height: int, width: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Size that the image processor resizes to; thin images are enlarged first, and a side can become 0.

    Raises:
        ValueError: sides that differ by more than 200 : 1.
    """
    if height < TOKEN_SIDE:
        height, width = TOKEN_SIDE, round(width * TOKEN_SIDE / height)
    if width < TOKEN_SIDE:
        height, width = round(height * TOKEN_SIDE / width), TOKEN_SIDE
    _check_aspect_ratio(height, width)
    rows, columns = round(height / TOKEN_SIDE), round(width / TOKEN_SIDE)
    return _within_budget(height, width, rows, columns, min_pixels, max_pixels, least=0)


def published_video_sampling(
    total_frames: int, video_fps: float, height: int, width: int, **options: Unpack[MediaOptions]
) -> VideoSampling:
    """Frames and size of a video.

    Raises:
        ValueError: an empty time range, both ``fps`` and ``nframes``, or a number of frames outside [2, total_frames].
    """
    first, last = _frame_range(total_frames, video_fps, options)
    available = last - first + 1
    frames = _frame_count(available, video_fps, options)
    min_pixels = options.get("min_pixels", VIDEO_MIN_PIXELS)
    total_pixels = options.get("total_pixels", VIDEO_TOTAL_PIXELS)
    budget = max(min(VIDEO_MAX_PIXELS, total_pixels / frames * FRAME_FACTOR), int(min_pixels * 1.05))
    max_pixels = min(options.get("max_pixels", budget), budget)
    if "resized_height" in options and "resized_width" in options:
        size = published_utils_resize(
            options["resized_height"], options["resized_width"], IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS
        )
    else:
        size = published_utils_resize(height, width, min_pixels, max_pixels)
    return VideoSampling(spread_indices(first, last, frames), frames / available * video_fps, *size)


def _frame_range(total_frames: int, video_fps: float, options: MediaOptions) -> tuple[int, int]:
    """First and last frame of the time range asked for."""
    if "video_start" not in options and "video_end" not in options:
        return 0, total_frames - 1
    try:
        return time_range(total_frames, video_fps, options.get("video_start"), options.get("video_end"))
    except SampleError as error:
        raise ValueError(str(error)) from error


def _frame_count(available: int, video_fps: float, options: MediaOptions) -> int:
    if "fps" in options and "nframes" in options:
        raise ValueError("give fps or nframes, not both")
    if "nframes" in options:
        frames = round(options["nframes"] / FRAME_FACTOR) * FRAME_FACTOR
    else:
        low = math.ceil(options.get("min_frames", DEFAULT_MIN_FRAMES) / FRAME_FACTOR) * FRAME_FACTOR
        high = _floor_even(options.get("max_frames", min(DEFAULT_MAX_FRAMES, available)))
        wanted = available / video_fps * options.get("fps", DEFAULT_FPS)
        frames = _floor_even(min(min(max(wanted, low), high), available))
    if not FRAME_FACTOR <= frames <= available:
        raise ValueError(f"{frames} frames asked for; between {FRAME_FACTOR} and {available} are possible")
    return frames


def _floor_even(value: float) -> int:
    return math.floor(value / FRAME_FACTOR) * FRAME_FACTOR


def _within_budget(
    height: int, width: int, rows: int, columns: int, min_pixels: float, max_pixels: float, least: int
) -> tuple[int, int]:
    pixels = rows * columns * PIXELS_PER_TOKEN
    if pixels > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(least, math.floor(height / scale / TOKEN_SIDE))
        columns = max(least, math.floor(width / scale / TOKEN_SIDE))
    elif pixels < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / TOKEN_SIDE)
        columns = math.ceil(width * scale / TOKEN_SIDE)
    return rows * TOKEN_SIDE, columns * TOKEN_SIDE


def _check_aspect_ratio(height: int, width: int) -> None:
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"sides of {height} x {width} pixels differ by more than {MAX_ASPECT_RATIO}:1")
