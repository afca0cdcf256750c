"""Bytes of a video -> 14 x 14 pixel patches of the frames that training looks at.

Containers are demuxed whole (cheap, and the header is not trusted), but only the groups of pictures that hold a
wanted frame are decoded, in time order and one frame at a time. One thread: the readers are parallel by process.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from PIL import Image

from keye_train.model.images import resize_to_grid, to_patches
from keye_train.model.positions import Grid, video_frame_indices, video_grid, video_seconds_per_grid
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

MAX_FRAME_PIXELS = 8192 * 4320
# Playlists and image sequences could make FFmpeg open other files; these demuxers read only what they are given.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf"


def probe_video(data: bytes) -> MediaInfo:
    """Size, true number of frames and true average rate of a video; decodes one frame.

    Raises:
        SampleError: not a video, broken, empty, or with frames above ``MAX_FRAME_PIXELS``.
    """
    with _opened(data) as stream:
        return stream.info


def decode_video(data: bytes, resolution: ResolutionSettings) -> tuple[np.ndarray, Grid, float]:
    """Decode the frames that ``positions.video_frame_indices`` names, each resized once.

    A frame that the decoder does not deliver (hidden or dropped by the encoder) is replaced by the one before it.

    Returns:
        patches [t * h * w, 3, 14, 14] uint8 RGB in raster order, the grid (t, h, w), and the seconds between two
        time steps.

    Raises:
        SampleError: broken, too large, too thin, without frame rate, or of an unknown kind.
    """
    with _opened(data) as stream:
        grid = video_grid(stream.info, resolution)
        order = sorted(range(len(stream.times)), key=stream.times.__getitem__)
        wanted = [order[i] for i in video_frame_indices(stream.info, resolution)]
        frames = (resize_to_grid(upright(frame), grid) for frame in stream.frames(wanted))
        patches = [to_patches(frame[None]) for frame in frames]
        return np.concatenate(patches), grid, video_seconds_per_grid(stream.info, resolution)


def upright(frame: av.VideoFrame) -> Image.Image:
    """RGB picture of a frame, turned as its display matrix says."""
    image = frame.to_image()
    quarter_turns = round(frame.rotation / 90) % 4  # counter-clockwise
    return image.rotate(90 * quarter_turns, expand=True) if quarter_turns else image


@dataclass
class _Stream:
    """A demuxed video. Positions count shown packets in decoding order; times are in ``seconds_per_tick``."""

    context: av.VideoCodecContext
    packets: list[av.Packet]
    times: list[int]
    info: MediaInfo

    def frames(self, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
        """Yield one frame for each wanted position; the positions ascend in presentation time."""
        targets = deque(self.times[position] for position in wanted)
        latest: av.VideoFrame | None = None
        for start, stop in self._runs(wanted):
            for packet in [*self.packets[start:stop], None]:
                for frame in self.context.decode(packet):
                    _check_frame(frame)
                    while latest is not None and targets and targets[0] < (frame.pts or 0):
                        yield latest
                        targets.popleft()
                    latest = frame
            self.context.flush_buffers()
        if latest is None:
            raise SampleError("broken video: no frame can be decoded")
        for _ in targets:
            yield latest

    def _runs(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """Ranges of packets, each from a key frame on, that must be decoded to see the wanted positions."""
        keys = [i for i, packet in enumerate(self.packets) if packet.is_keyframe]
        needed = np.zeros(len(self.packets) + 1, dtype=np.int8)
        for position in set(wanted):
            # A frame shown before its key frame leans on the group before that one.
            usable = [key for key in keys if key <= position and self.times[key] <= self.times[position]]
            needed[(usable[-1] if usable else 0) : position + 1] = 1
        edges = np.flatnonzero(np.diff(needed, prepend=0))
        return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@contextmanager
def _opened(data: bytes) -> Iterator[_Stream]:
    """Demux a video and decode its first frame; FFmpeg's errors within the block become SampleError."""
    try:
        options = {"format_whitelist": DEMUXERS}
        with av.open(io.BytesIO(data), mode="r", options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise SampleError("media without a video stream")
            video = container.streams.video[0]
            context = video.codec_context
            if context is None:
                raise SampleError("video of an unknown codec")
            context.thread_count = 1
            packets = [packet for packet in container.demux(video) if packet.size]
            fps = _frame_rate(video, packets)
            times = _presentation_times(packets)
            width, height = _upright_size(context, packets)
            yield _Stream(context, packets, times, MediaInfo(MediaKind.video, width, height, len(packets), fps))
    except av.FFmpegError as error:
        raise SampleError(f"broken video: {error.strerror}") from error


def _presentation_times(packets: list[av.Packet]) -> list[int]:
    """Time stamp of each packet; streams without them (raw or AVI) are numbered in decoding order."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) == len(packets):
        return times
    for number, packet in enumerate(packets):
        packet.pts = number
    return list(range(len(packets)))


def _frame_rate(video: av.VideoStream, packets: list[av.Packet]) -> float:
    """Average frames per second from the time stamps, or the header's where they say nothing."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) == len(packets) > 1 and max(times) > min(times) and video.time_base:
        return float((len(times) - 1) / ((max(times) - min(times)) * video.time_base))
    return float(video.average_rate or video.guessed_rate or 0)


def _upright_size(context: av.VideoCodecContext, packets: list[av.Packet]) -> tuple[int, int]:
    """Width and height of the first frame as it is shown."""
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            _check_frame(frame)
            context.flush_buffers()
            turned = round(frame.rotation / 90) % 2
            return (frame.height, frame.width) if turned else (frame.width, frame.height)
    raise SampleError("broken video: no frame can be decoded")


def _check_frame(frame: av.VideoFrame) -> None:
    if frame.is_corrupt:
        raise SampleError("broken video: a frame is corrupt")
    if frame.pts is None:
        raise SampleError("broken video: a frame has no time stamp")
    if frame.width * frame.height > MAX_FRAME_PIXELS:
        raise SampleError(f"video of {frame.width} x {frame.height} pixels is above {MAX_FRAME_PIXELS} pixels a frame")
