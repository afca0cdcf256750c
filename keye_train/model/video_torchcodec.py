"""Frames of a video through torchcodec, where that and the FFmpeg it needs are installed.

PyAV stays the one that reads containers: which frames are taken is decided there, so both backends take the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from keye_train.sample import SampleError
from keye_train.settings import SettingsError, VideoBackend

FRAMES_AT_ONCE = 16  # decoded frames held together, at most


@cache
def torchcodec_error() -> str | None:
    """Why torchcodec cannot be used here; None where it can."""
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception as error:  # missing package, missing FFmpeg, or built for another torch: RuntimeError or OSError
        return " ".join(str(error).split())[:200] or type(error).__name__
    return None


def checked_backend(backend: VideoBackend) -> VideoBackend:
    """The backend that is used: ``auto`` is decided here.

    Raises:
        SettingsError: torchcodec is asked for and cannot be loaded.
    """
    if backend == VideoBackend.pyav:
        return backend
    error = torchcodec_error()
    if error is None:
        return VideoBackend.torchcodec
    if backend == VideoBackend.auto:
        return VideoBackend.pyav
    raise SettingsError(
        f"video_backend=torchcodec cannot be loaded ({error}): install torchcodec and the shared libraries of FFmpeg, "
        "or set video_backend=pyav"
    )


def torchcodec_frames(data: bytes | Path, indices: Sequence[int]) -> Iterator[Image.Image]:
    """Decode frames to RGB pictures.

    Args:
        data: a video that no display matrix turns.
        indices: numbers in order of presentation, ascending.

    Raises:
        SampleError: a frame cannot be decoded.
    """
    from torchcodec.decoders import VideoDecoder

    try:
        decoder: Any = VideoDecoder(
            data if isinstance(data, bytes) else str(data.resolve()),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            seek_mode="exact",
        )
        for start in range(0, len(indices), FRAMES_AT_ONCE):
            batch = decoder.get_frames_at(indices=list(indices[start : start + FRAMES_AT_ONCE]))
            for frame in batch.data:
                yield Image.fromarray(frame.numpy())
    except (RuntimeError, ValueError, IndexError) as error:
        raise SampleError(f"broken video: {' '.join(str(error).split())[:200]}") from error
