"""The pixels of the published inference code, quirks included: two resizes, in two packages, by different rules.

The utility package fetches and resizes first (``fetch_*``), the image processor resizes again and cuts patches
(``*_patches``). Training uses ``images.py`` and ``video.py`` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from keye_train.model.images import on_white, to_patches
from keye_train.model.media_options import MediaOptions
from keye_train.model.positions import PATCH_SIZE, Grid
from keye_train.model.published import (
    DEFAULT_FPS,
    FRAME_FACTOR,
    IMAGE_MAX_PIXELS,
    IMAGE_MIN_PIXELS,
    published_processor_resize,
    published_utils_resize,
    published_video_sampling,
)
from keye_train.model.video import open_video


def fetch_image(image: Image.Image, options: MediaOptions) -> Image.Image:
    """First resize of a picture, to RGB within the message's limits; no EXIF rotation.

    Transparency is laid on white for RGBA alone; other modes lose it.

    Raises:
        ValueError: sides that differ by more than 200 : 1.
    """
    image = on_white(image) if image.mode == "RGBA" else image.convert("RGB")
    if "resized_height" in options and "resized_width" in options:
        asked, limits = (options["resized_height"], options["resized_width"]), (IMAGE_MIN_PIXELS, IMAGE_MAX_PIXELS)
    else:
        asked = (image.height, image.width)
        limits = (options.get("min_pixels", IMAGE_MIN_PIXELS), options.get("max_pixels", IMAGE_MAX_PIXELS))
    height, width = published_utils_resize(*asked, *limits)
    return image.resize((width, height))


def fetch_video(video: bytes | Path | Sequence[Image.Image], options: MediaOptions) -> tuple[list[np.ndarray], float]:
    """Frames of a video after their first resize, and the frames per second they stand for.

    A list of frames goes through ``fetch_image`` with the image's limits; an odd one has its last frame repeated, and
    without ``fps`` it is taken for 2 frames a second.

    Returns:
        frames [height, width, 3] uint8 of one size, and their rate.

    Raises:
        ValueError: see ``published_video_sampling``.
        SampleError: the video is broken.
    """
    if not isinstance(video, (bytes, Path)):
        frames = [np.asarray(fetch_image(frame, options)) for frame in video]
        frames += [frames[-1]] * (len(frames) % FRAME_FACTOR)
        return frames, float(options.get("fps", DEFAULT_FPS))
    with open_video(video) as opened:
        info = opened.info
        taken = published_video_sampling(info.frames, info.fps, info.height, info.width, **options)
        pictures = opened.pictures(taken.indices)
        return [resize_frame(np.asarray(frame), taken.height, taken.width) for frame in pictures], taken.sample_fps


def resize_frame(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bicubic resize of [h, w, 3] uint8 as torchvision does it: in float32, clamped and rounded."""
    levels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float()
    resized = F.interpolate(levels, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def image_patches(
    image: Image.Image | np.ndarray | Tensor, min_pixels: int, max_pixels: int
) -> tuple[np.ndarray, Grid]:
    """Second resize and patches, as the image processor alone does it: transparency is dropped.

    An array of three axes whose first one has length 1 or 3 is taken for channels-first, whatever the last one is.

    Returns:
        patches [h * w, 3, 14, 14] uint8, and the grid (1, h, w).

    Raises:
        ValueError: such an array with one channel (as a picture 1 pixel high becomes), no channels at either end, or
            sides that differ by more than 200 : 1.
    """
    levels = np.asarray(image.convert("RGB")) if isinstance(image, Image.Image) else np.asarray(image)
    if levels.ndim != 3 or (levels.shape[0] not in (1, 3) and levels.shape[2] not in (1, 3)):
        raise ValueError(f"image of shape {levels.shape}: no channels found at either end")
    if levels.shape[0] in (1, 3):
        levels = np.moveaxis(levels, 0, 2)
    if levels.shape[2] != 3:
        raise ValueError(f"image of {levels.shape[2]} channel for 3 values of image_mean")
    height, width = published_processor_resize(levels.shape[0], levels.shape[1], min_pixels, max_pixels)
    return _resized_patches([levels], height, width)


def video_patches(frames: Sequence[np.ndarray], min_pixels: int, max_pixels: int) -> tuple[np.ndarray, Grid]:
    """Second resize and patches of frames [height, width, 3] uint8 of one size, with the limits of an image.

    Returns:
        patches [t * h * w, 3, 14, 14] uint8, and the grid (t, h, w).

    Raises:
        ValueError: sides that differ by more than 200 : 1.
    """
    height, width = published_processor_resize(frames[0].shape[0], frames[0].shape[1], min_pixels, max_pixels)
    return _resized_patches(frames, height, width)


def _resized_patches(frames: Sequence[np.ndarray], height: int, width: int) -> tuple[np.ndarray, Grid]:
    if not height or not width:
        raise ValueError(f"an image resized to {height} x {width} pixels")
    bicubic = Image.Resampling.BICUBIC
    resized = [np.asarray(Image.fromarray(frame.astype(np.uint8)).resize((width, height), bicubic)) for frame in frames]
    return to_patches(np.stack(resized)), (len(resized), height // PATCH_SIZE, width // PATCH_SIZE)
