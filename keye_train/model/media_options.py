"""What one message may ask of its own image or video, and what it then costs: pure functions, nothing is decoded.

An option changes the recipe's budgets for one medium. After ``MediaRequest.of`` the ordinary rules of ``positions.py``
apply, so the tokens foretold and the tokens decoded come from one formula.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from keye_train.model.positions import (
    TOKEN_SIDE,
    Grid,
    grid_tokens,
    media_grid,
    media_seconds_per_grid,
    video_frame_indices,
)
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

PIXELS_PER_TOKEN = TOKEN_SIDE**2


class MediaOptions(TypedDict, total=False):
    """Keys that an image or video of a message may carry; names and units are those of the published code.

    ``resized_*`` stand in for the medium's own size. For a list of frames, ``fps`` is the rate they were taken at; for
    a video file, the rate to sample it at.
    """

    min_pixels: int  # of an image, or of one frame
    max_pixels: int
    resized_height: int  # pixels
    resized_width: int
    total_pixels: int  # of all frames of a video; the keys from here on are for videos only
    fps: float
    nframes: int
    min_frames: int
    max_frames: int
    video_start: float  # seconds
    video_end: float


OPTION_NAMES = frozenset(MediaOptions.__annotations__)
IMAGE_OPTION_NAMES = frozenset({"min_pixels", "max_pixels", "resized_height", "resized_width"})
_MAY_BE_ZERO = frozenset({"video_start"})


def media_options(item: Mapping[str, Any], kind: MediaKind, strict: bool = False) -> MediaOptions:
    """The options among the keys of a content item.

    Args:
        item: keys that are no options are left alone, or with ``strict`` refused.
        kind: of the medium.
        strict: nothing but options is expected.

    Raises:
        SampleError: a value that is no positive number, an option that only videos have on an image, or options that
            exclude each other.
    """
    if strict and (unknown := sorted(set(item) - OPTION_NAMES)):
        raise SampleError(f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(OPTION_NAMES))}")
    found = {key: item[key] for key in sorted(OPTION_NAMES & set(item)) if item[key] is not None}
    for key, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key not in _MAY_BE_ZERO):
            raise SampleError(f"{kind.value} with {key}={value!r}: give a number above 0")
        if kind == MediaKind.image and key not in IMAGE_OPTION_NAMES:
            raise SampleError(f"image with the option {key}, which is one of videos")
    for left, right in (("fps", "nframes"), ("nframes", "min_frames"), ("nframes", "max_frames")):
        if left in found and right in found:
            raise SampleError(f"options {left} and {right} exclude each other; give one of them")
    if ("resized_height" in found) != ("resized_width" in found):
        raise SampleError("give resized_height and resized_width together")
    return MediaOptions(**found)  # type: ignore[typeddict-item]


@dataclass(frozen=True)
class MediaRequest:
    """One image or video with its options worked in."""

    info: MediaInfo  # of the time range asked for
    resolution: ResolutionSettings  # with the message's own limits
    first_frame: int = 0  # where the time range begins

    @classmethod
    def of(cls, info: MediaInfo, resolution: ResolutionSettings, options: MediaOptions | None = None) -> MediaRequest:
        """Work ``options`` into the size of the medium and the budgets of the recipe.

        Raises:
            SampleError: a time range without frames, or limits that cannot hold together.
        """
        options = options or MediaOptions()
        first = 0
        if info.kind == MediaKind.video and ("video_start" in options or "video_end" in options):
            first, last = time_range(info.frames, info.fps, options.get("video_start"), options.get("video_end"))
            info = replace(info, frames=last - first + 1)
        if "resized_height" in options:
            info = replace(info, width=round(options["resized_width"]), height=round(options["resized_height"]))
        limits = _video_limits if info.kind == MediaKind.video else _image_limits
        return cls(info, limits(resolution, options), first)

    @property
    def grid(self) -> Grid:
        """Patch grid (t, h, w)."""
        return media_grid(self.info, self.resolution)

    @property
    def tokens(self) -> int:
        """Language tokens."""
        return grid_tokens(self.grid)

    @property
    def seconds_per_grid(self) -> float:
        """Seconds between two time steps; 0 for images."""
        return media_seconds_per_grid(self.info, self.resolution)

    @property
    def frame_indices(self) -> list[int]:
        """Numbers of the frames taken from the whole video, ascending, if they follow each other evenly."""
        return [self.first_frame + index for index in video_frame_indices(self.info, self.resolution)]


def token_limit(kind: MediaKind, tokens: int, resolution: ResolutionSettings) -> MediaOptions:
    """Options of an image or video that takes at most ``tokens`` language tokens, and no more than its recipe allows.

    A video gets smaller frames first, and fewer of them where they are as small as the recipe allows. 0: no limit.
    """
    if not tokens:
        return MediaOptions()
    if kind == MediaKind.video:
        return MediaOptions(total_pixels=min(tokens, resolution.video_max_tokens) * PIXELS_PER_TOKEN)
    return MediaOptions(max_pixels=min(tokens, resolution.image_max_tokens) * PIXELS_PER_TOKEN)


# Limits of a video as processor_config.json names them -> field of ResolutionSettings, and pixels in its unit
_VIDEO_LIMITS = {
    "min_pixels": ("video_frame_min_tokens", PIXELS_PER_TOKEN),
    "max_pixels": ("video_frame_max_tokens", PIXELS_PER_TOKEN),
    "total_pixels": ("video_max_tokens", PIXELS_PER_TOKEN),
    "fps": ("video_fps", 1),
    "min_frames": ("video_min_frames", 1),
    "max_frames": ("video_max_frames", 1),
}


def image_limits(resolution: ResolutionSettings) -> dict[str, int]:
    """The limits of an image in the names and units of ``MediaOptions``."""
    return {
        "min_pixels": resolution.image_min_tokens * PIXELS_PER_TOKEN,
        "max_pixels": resolution.image_max_tokens * PIXELS_PER_TOKEN,
    }


def video_limits(resolution: ResolutionSettings) -> dict[str, float]:
    """The limits of videos in the names and units of ``MediaOptions``."""
    return {name: getattr(resolution, field) * unit for name, (field, unit) in _VIDEO_LIMITS.items()}


def with_video_limits(resolution: ResolutionSettings, limits: Mapping[str, float]) -> ResolutionSettings:
    """``resolution`` with those of the limits that are given.

    Raises:
        ValueError: a limit of another name, or limits that cannot hold together.
    """
    if unknown := sorted(set(limits) - set(_VIDEO_LIMITS)):
        raise ValueError(f"limits of videos: unknown {', '.join(unknown)}; known are {', '.join(_VIDEO_LIMITS)}")
    try:
        return _video_limits(resolution, media_options(limits, MediaKind.video))
    except SampleError as error:
        raise ValueError(f"limits of videos: {error}") from error


def time_range(frames: int, fps: float, start: float | None, end: float | None) -> tuple[int, int]:
    """First and last frame within [start, end] seconds, as the published code finds them.

    Raises:
        SampleError: no frame rate, or fewer than two frames in the range.
    """
    if frames < 1 or not (math.isfinite(fps) and fps > 0):
        raise SampleError(f"video of {frames} frames at {fps} frames/s")
    duration = frames / fps
    first, last = 0, frames - 1
    if start is not None:
        first = math.ceil(min(max(start, 0.0), duration) * fps)
    if end is not None:
        last = min(math.floor(min(max(end, 0.0), duration) * fps), frames - 1)
    if first >= last:
        raise SampleError(
            f"the time range from {start} s to {end} s holds no frames of a video of {duration:.3f} s: "
            f"first frame {first}, last {last}"
        )
    return first, last


def _image_limits(resolution: ResolutionSettings, options: MediaOptions) -> ResolutionSettings:
    low, high = _token_limits(resolution.image_min_tokens, resolution.image_max_tokens, options)
    return replace(resolution, image_min_tokens=low, image_max_tokens=high)


def _video_limits(resolution: ResolutionSettings, options: MediaOptions) -> ResolutionSettings:
    total = resolution.video_max_tokens
    if "total_pixels" in options:
        total = max(1, math.floor(options["total_pixels"] / PIXELS_PER_TOKEN))
    low, high = _token_limits(resolution.video_frame_min_tokens, resolution.video_frame_max_tokens, options)
    if low > total:
        if "min_pixels" in options:
            raise SampleError(f"a frame of at least {low} tokens is above the {total} tokens of its whole video")
        low = total
    fewest, most = resolution.video_min_frames, resolution.video_max_frames
    if "nframes" in options:
        fewest = most = max(1, round(options["nframes"]))
        if fewest * low > total:
            raise SampleError(
                f"nframes={fewest} frames of at least {low} tokens are above the {total} tokens of their video: "
                "lower nframes or min_pixels, or raise total_pixels"
            )
    elif "min_frames" in options or "max_frames" in options:
        fewest = math.ceil(options.get("min_frames", min(fewest, options.get("max_frames", fewest))))
        most = math.floor(options.get("max_frames", max(most, fewest)))
        if not 0 < fewest <= most:
            raise SampleError(f"min_frames={fewest} is above max_frames={most}")
    return replace(
        resolution,
        video_frame_min_tokens=low,
        video_frame_max_tokens=max(low, min(high, total)),
        video_max_tokens=total,
        video_min_frames=fewest,
        video_max_frames=most,
        video_fps=float(options.get("fps", resolution.video_fps)),
    )


def _token_limits(low: int, high: int, options: MediaOptions) -> tuple[int, int]:
    """Limits in tokens; an explicit limit moves the other one along, two explicit ones must agree."""
    if "min_pixels" in options:
        low = max(1, math.ceil(options["min_pixels"] / PIXELS_PER_TOKEN))
        high = max(low, high)
    if "max_pixels" in options:
        high = max(1, math.floor(options["max_pixels"] / PIXELS_PER_TOKEN))
        if low > high and "min_pixels" in options:
            raise SampleError(
                f"min_pixels={options['min_pixels']} needs {low} tokens, "
                f"max_pixels={options['max_pixels']} allows {high}"
            )
        low = min(low, high)
    return low, high
