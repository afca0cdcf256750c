"""Sizes and positions of media in the token sequence: pure functions, no decoding, no weights.

Two questions are answered here. How many tokens will this image or video take (from its header and the settings
alone), and which three-axis RoPE position does each token get. The rules are the corrected ones that training uses;
the rules of the published inference code, with their quirks, stand in ``published.py``.

Legend: L tokens of one sequence, B sequences, M images and videos. A grid (t, h, w) counts 14 x 14 pixel patches;
2 x 2 patches make one token, so a grid takes t * h * w / 4 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

PATCH_SIZE = 14
MERGE_SIZE = 2
TOKEN_SIDE = PATCH_SIZE * MERGE_SIZE  # pixels
PATCH_BYTES = 3 * PATCH_SIZE**2  # as levels of red, green and blue
TOKENS_PER_SECOND = 2  # steps of the time axis that one second of video takes
MAX_ASPECT_RATIO = 200

Grid = tuple[int, int, int]


def grid_tokens(grid: Sequence[int]) -> int:
    """Language tokens that a (t, h, w) grid of patches takes."""
    t, h, w = grid
    return t * h * w // MERGE_SIZE**2


# ---------------------------------------------------------------------------------------------------- sizes


def smart_resize(width: int, height: int, min_tokens: int, max_tokens: int) -> tuple[int, int]:
    """Token rows and columns that keep the aspect ratio, within a budget.

    Same result as the published image processor, but ``max_tokens`` is never exceeded (also not by thin images) and
    no side becomes 0. ``min_tokens`` gives way where both cannot hold. A side below 28 pixels enlarges the picture
    instead of distorting it.

    Args:
        width, height: pixels.
        min_tokens, max_tokens: limits of rows * columns.

    Returns:
        (rows, columns), each at least 1; the picture is to be resized to 28 * rows by 28 * columns pixels.

    Raises:
        SampleError: no pixels, or sides that differ by more than 200 : 1.
    """
    if width < 1 or height < 1:
        raise SampleError(f"media of {width} x {height} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise SampleError(f"aspect ratio of {width} x {height} pixels is above {MAX_ASPECT_RATIO}:1")
    if height < TOKEN_SIDE:
        width, height = round(width * TOKEN_SIDE / height), TOKEN_SIDE
    if width < TOKEN_SIDE:
        width, height = TOKEN_SIDE, round(height * TOKEN_SIDE / width)
    rows, columns = round(height / TOKEN_SIDE), round(width / TOKEN_SIDE)
    if rows * columns > max_tokens:
        scale = math.sqrt(width * height / (max_tokens * TOKEN_SIDE**2))
        rows = max(1, math.floor(height / scale / TOKEN_SIDE))
        columns = max(1, math.floor(width / scale / TOKEN_SIDE))
    elif rows * columns < min_tokens:
        scale = math.sqrt(min_tokens * TOKEN_SIDE**2 / (width * height))
        rows = math.ceil(height * scale / TOKEN_SIDE)
        columns = math.ceil(width * scale / TOKEN_SIDE)
    # Rounding up, or a side held at 1, can still overshoot; the longer side pays.
    if rows * columns > max_tokens:
        if rows > columns:
            columns = min(columns, max_tokens)
            rows = max_tokens // columns
        else:
            rows = min(rows, max_tokens)
            columns = max_tokens // rows
    return rows, columns


def image_grid(width: int, height: int, resolution: ResolutionSettings) -> Grid:
    """Patch grid (1, h, w) of an image of ``width`` x ``height`` pixels.

    Raises:
        SampleError: see ``smart_resize``.
    """
    rows, columns = smart_resize(width, height, resolution.image_min_tokens, resolution.image_max_tokens)
    return 1, rows * MERGE_SIZE, columns * MERGE_SIZE


def video_frame_count(info: MediaInfo, resolution: ResolutionSettings) -> int:
    """Frames taken from a video: ``video_fps`` of them a second, within the limits on frames and on tokens.

    Frames are repeated only to reach ``video_min_frames``, never to raise the rate of a slow stream.

    Raises:
        SampleError: the video has no frames or no frame rate.
    """
    if info.frames < 1 or not (math.isfinite(info.fps) and info.fps > 0):
        raise SampleError(f"video of {info.frames} frames at {info.fps} frames/s")
    wanted = min(round(info.frames / info.fps * resolution.video_fps), info.frames)
    affordable = resolution.video_max_tokens // resolution.video_frame_min_tokens
    bounded = min(max(wanted, resolution.video_min_frames), resolution.video_max_frames)
    return max(1, min(bounded, affordable))


def video_frame_indices(info: MediaInfo, resolution: ResolutionSettings) -> list[int]:
    """Numbers of the frames taken, ascending; a video with too few frames has some of them repeated."""
    return spread_indices(0, info.frames - 1, video_frame_count(info, resolution))


def spread_indices(first: int, last: int, count: int) -> list[int]:
    """``count`` whole numbers spread evenly over [first, last] with both ends, in float32 as the published code."""
    return torch.linspace(first, last, count).round().long().tolist()


def video_seconds_per_grid(info: MediaInfo, resolution: ResolutionSettings) -> float:
    """Seconds between two frames taken: the inverse of the rate that was really sampled, not of the rate asked for."""
    return info.frames / info.fps / video_frame_count(info, resolution)


def video_grid(info: MediaInfo, resolution: ResolutionSettings) -> Grid:
    """Patch grid (t, h, w) of a video; one frame is one time step, and all frames share ``video_max_tokens``.

    Raises:
        SampleError: see ``smart_resize`` and ``video_frame_count``.
    """
    frames = video_frame_count(info, resolution)
    frame_tokens = min(resolution.video_frame_max_tokens, resolution.video_max_tokens // frames)
    rows, columns = smart_resize(info.width, info.height, resolution.video_frame_min_tokens, frame_tokens)
    return frames, rows * MERGE_SIZE, columns * MERGE_SIZE


def media_grid(info: MediaInfo, resolution: ResolutionSettings) -> Grid:
    """Patch grid (t, h, w) of any media, from its header alone."""
    if info.kind == MediaKind.video:
        return video_grid(info, resolution)
    return image_grid(info.width, info.height, resolution)


def media_seconds_per_grid(info: MediaInfo, resolution: ResolutionSettings) -> float:
    """Seconds between time steps: 0 for images."""
    return video_seconds_per_grid(info, resolution) if info.kind == MediaKind.video else 0.0


# ------------------------------------------------------------------------------------------------ positions


def sample_positions(
    input_ids: Tensor,
    grids: Sequence[Sequence[int]],
    seconds_per_grid: Sequence[float],
    *,
    image_pad_id: int,
    video_pad_id: int,
    tokens_per_second: int = TOKENS_PER_SECOND,
) -> Tensor:
    """Three-axis RoPE positions of one sample (``get_rope_index`` of the published code, without its loops).

    Text tokens advance all axes by one. The tokens of a grid stand at (time, row, column) relative to the running
    position; after them it goes on behind the largest position of any axis. Time steps are
    trunc(k * seconds_per_grid * tokens_per_second) in float32.

    Args:
        input_ids: [L] int64.
        grids: (t, h, w) in patches of each image and video, in order of appearance.
        seconds_per_grid: of each grid; 0 for images.

    Returns:
        [3, L] int64: time, height, width.

    Raises:
        ValueError: the pad tokens do not match the grids, or those of a grid do not follow each other.
    """
    ids = input_ids.numpy()
    pads = np.flatnonzero((ids == image_pad_id) | (ids == video_pad_id))
    lengths = [grid_tokens(grid) for grid in grids]
    if sum(lengths) != len(pads):
        raise ValueError(f"{len(pads)} image and video pad tokens, but the grids take {sum(lengths)} tokens")
    positions = np.empty((3, len(ids)), dtype=np.int64)
    positions[:] = np.arange(len(ids))
    shift = done = end = 0  # shift: position - row of the text here; done: pads; end: of the last grid
    for (t, height, width), seconds, length in zip(grids, seconds_per_grid, lengths, strict=True):
        before, start = end, int(pads[done])
        done, end = done + length, start + length
        if pads[done - 1] != end - 1:
            raise ValueError(f"the {length} pad tokens of a grid do not follow each other from row {start} on")
        positions[:, before:start] += shift
        h, w = height // MERGE_SIZE, width // MERGE_SIZE
        block = positions[:, start:end].reshape(3, t, h, w)
        steps = _time_steps(np.arange(t), np.float32(seconds), tokens_per_second)
        block[0] = (steps + (start + shift))[:, None, None]
        block[1] = np.arange(start + shift, start + shift + h)[:, None]
        block[2] = np.arange(start + shift, start + shift + w)
        shift += max(int(steps[-1]), h - 1, w - 1) + 1 - length
    positions[:, end:] += shift
    return torch.from_numpy(positions)


def rope_index(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    image_grid_thw: Tensor | None,
    video_grid_thw: Tensor | None,
    second_per_grid_ts: Tensor | None,
    *,
    vision_start_id: int,
    image_pad_id: int,
    video_pad_id: int,
    tokens_per_second: int = TOKENS_PER_SECOND,
) -> tuple[Tensor, Tensor]:
    """Positions of a padded batch, exactly as ``get_rope_index`` of the published code gives them.

    Args:
        input_ids: [B, L] int64.
        attention_mask: [B, L], 1 at real tokens; None: all are real.
        image_grid_thw: [images, 3] over the whole batch, or None.
        video_grid_thw: [videos, 3] over the whole batch, or None.
        second_per_grid_ts: [videos] seconds per time step; None: one second each.

    Returns:
        position_ids [3, B, L] int64 (1 at padded places) and rope_deltas [B, 1] int64: what is added to a token's
        place in the padded row to get its position while decoding.

    Raises:
        ValueError: the pad tokens do not match the grids.
    """
    batch, length = input_ids.shape
    device = input_ids.device
    ids = input_ids.cpu()
    mask = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.cpu().bool()
    image_grids = [] if image_grid_thw is None else image_grid_thw.tolist()
    video_grids = [] if video_grid_thw is None else video_grid_thw.tolist()
    seconds = [1.0] * len(video_grids) if second_per_grid_ts is None else second_per_grid_ts.tolist()
    has_vision = bool(image_grids or video_grids)
    # Each with its seconds per time step, in the order in which the rows open them
    queues = {
        image_pad_id: zip(image_grids, repeat(0.0), strict=False),
        video_pad_id: zip(video_grids, seconds, strict=False),
    }

    positions = torch.ones(3, batch, length, dtype=torch.int64)
    deltas = torch.empty(batch, 1, dtype=torch.int64)
    for i in range(batch):
        row = ids[i, mask[i]]
        opened = row[1:][row[:-1] == vision_start_id].tolist()
        try:
            media = [next(queues[token]) for token in opened if token in queues]
        except StopIteration as error:
            raise ValueError(f"row {i} opens more images or videos than there are grids") from error
        own = sample_positions(
            row,
            [grid for grid, _ in media],
            [step for _, step in media],
            image_pad_id=image_pad_id,
            video_pad_id=video_pad_id,
            tokens_per_second=tokens_per_second,
        )
        positions[:, i, mask[i]] = own
        # The published text-only path takes the maximum over padded places too, which hold 1.
        deltas[i, 0] = (own.max() if has_vision else positions[:, i].max()) + 1 - length
    return positions.to(device), deltas.to(device)


def _time_steps(frames: np.ndarray, seconds: np.float32, tokens_per_second: int) -> np.ndarray:
    """trunc(k * seconds * tokens_per_second), each product rounded to float32 as the published code does."""
    product = frames.astype(np.float32) * seconds
    return (product * np.float32(tokens_per_second)).astype(np.int64)
