"""What many images and videos take, without a Python loop: the rules of ``model.positions`` over whole columns.

The same numbers to the last one (a test compares them): both work in float64, and round halves to even.
"""

from __future__ import annotations

import numpy as np

from keye_train.data.facts import KINDS, MEDIUM
from keye_train.model.positions import MAX_ASPECT_RATIO, MERGE_SIZE, TOKEN_SIDE, media_grid
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings


def media_sizes(media: np.ndarray, resolution: ResolutionSettings) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Language tokens and vision patches of images and videos.

    Args:
        media: [M] of ``facts.MEDIUM``.
        resolution: decides what they cost.

    Returns:
        Tokens and patches, [M] int64; place -> what is wrong with it, of those that have no grid (0 of both).
    """
    assert media.dtype == MEDIUM
    width, height = media["width"].astype(np.int64), media["height"].astype(np.int64)
    is_video = media["kind"] == KINDS.index(MediaKind.video)
    wrong = (width < 1) | (height < 1)
    wrong |= np.maximum(width, height) > MAX_ASPECT_RATIO * np.minimum(width, height)
    wrong |= is_video & ((media["frames"] < 1) | ~np.isfinite(media["fps"]) | ~(media["fps"] > 0))
    right = np.flatnonzero(~wrong)
    width, height, is_video = width[right], height[right], is_video[right]
    frames = np.ones(len(right), dtype=np.int64)
    least = np.full(len(right), resolution.image_min_tokens)
    most = np.full(len(right), resolution.image_max_tokens)
    if is_video.any():
        frames[is_video] = _video_frames(media[right[is_video]], resolution)
        least[is_video] = resolution.video_frame_min_tokens
        most[is_video] = np.minimum(resolution.video_frame_max_tokens, resolution.video_max_tokens // frames[is_video])
    rows, columns = _resized(width, height, least, most)
    tokens = np.zeros(len(media), dtype=np.int64)
    tokens[right] = frames * rows * columns
    errors = {place: _reason(media[place], resolution) for place in np.flatnonzero(wrong).tolist()}
    return tokens, tokens * MERGE_SIZE**2, errors


def _video_frames(media: np.ndarray, resolution: ResolutionSettings) -> np.ndarray:
    """``positions.video_frame_count`` of videos that have frames and a rate."""
    seconds = media["frames"] / media["fps"]
    wanted = np.minimum(np.rint(seconds * resolution.video_fps), media["frames"]).astype(np.int64)
    affordable = resolution.video_max_tokens // resolution.video_frame_min_tokens
    bounded = np.minimum(np.maximum(wanted, resolution.video_min_frames), resolution.video_max_frames)
    return np.maximum(1, np.minimum(bounded, affordable))


def _resized(
    width: np.ndarray, height: np.ndarray, least: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """``positions.smart_resize`` of media that have a grid: token rows and columns, [M] int64."""
    flat = height < TOKEN_SIDE
    width = np.where(flat, np.rint(width * TOKEN_SIDE / height), width).astype(np.int64)
    height = np.where(flat, TOKEN_SIDE, height)
    thin = width < TOKEN_SIDE
    height = np.where(thin, np.rint(height * TOKEN_SIDE / width), height).astype(np.int64)
    width = np.where(thin, TOKEN_SIDE, width)
    rows, columns = (np.rint(side / TOKEN_SIDE).astype(np.int64) for side in (height, width))
    large = np.flatnonzero(rows * columns > most)
    small = np.flatnonzero(rows * columns < least)  # of the two limits, most goes first
    small = small[rows[small] * columns[small] <= most[small]]
    scale = np.sqrt(width[large] * height[large] / (most[large] * TOKEN_SIDE**2))
    rows[large] = np.maximum(1, np.floor(height[large] / scale / TOKEN_SIDE))
    columns[large] = np.maximum(1, np.floor(width[large] / scale / TOKEN_SIDE))
    scale = np.sqrt(least[small] * TOKEN_SIDE**2 / (width[small] * height[small]))
    rows[small] = np.ceil(height[small] * scale / TOKEN_SIDE)
    columns[small] = np.ceil(width[small] * scale / TOKEN_SIDE)
    over = np.flatnonzero(rows * columns > most)
    tall = over[rows[over] > columns[over]]
    wide = over[rows[over] <= columns[over]]
    columns[tall] = np.minimum(columns[tall], most[tall])
    rows[tall] = most[tall] // columns[tall]
    rows[wide] = np.minimum(rows[wide], most[wide])
    columns[wide] = most[wide] // rows[wide]
    return rows, columns


def _reason(medium: np.void, resolution: ResolutionSettings) -> str:
    kind, *sides = medium.item()
    try:
        media_grid(MediaInfo(KINDS[kind], *sides), resolution)
    except SampleError as error:
        return str(error)
    raise AssertionError(f"{medium} has a grid")
