"""Frames to a short mp4 in memory."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
import numpy as np
from PIL import Image

# Both encoders run on one thread: their output then depends on the frames only.
ENCODERS: dict[str, dict[str, str]] = {"libx264": {"preset": "ultrafast", "crf": "18"}, "mpeg4": {}}


def encode_video(frames: Sequence[Image.Image], fps: int, encoder: str) -> bytes:
    """An mp4 of RGB frames with even sides (yuv420p).

    Raises:
        ValueError: this build of PyAV lacks the encoder.
    """
    if encoder not in av.codecs_available:
        raise ValueError(f"this build of PyAV has no encoder {encoder}: install the wheel from PyPI (pip install av)")
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(encoder, rate=fps, options=ENCODERS[encoder])
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()
