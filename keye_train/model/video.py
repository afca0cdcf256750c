"""A video -> 14 x 14 pixel patches of the frames that training looks at.

Containers are demuxed whole (cheap, and the header is not trusted), but only the groups of pictures that hold a
wanted frame are decoded, in time order and one frame at a time. One thread: the readers are parallel by process.

How many frames are taken follows from the length and the mean rate, so it is known without decoding. Which ones:
at a steady rate every n-th, as the published code takes them; at a variable rate the ones on screen at evenly spaced
times. Either way time step k of the grid lies k * seconds_per_grid seconds behind the first, give or take one step.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from PIL import Image

from keye_train.model.images import place_patches, resize_to_grid, to_patches, upright_rgb
from keye_train.model.media_options import MediaOptions, MediaRequest
from keye_train.model.positions import Grid
from keye_train.model.video_torchcodec import torchcodec_frames
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings, VideoBackend

MAX_FRAME_PIXELS = 8192 * 4320
MAX_FRAMES = 2**22
"""Packets of a video: 38 hours at 30 frames a second. Each takes memory before anything is decoded."""
MAX_VIDEO_PIXELS = 2**42
"""Width x height x frames as declared: 20 hours of 1080p, 5 hours of 4K at 30 frames a second."""
# Playlists and image sequences could make FFmpeg open other files; these demuxers read only what they are given.
DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf"


VideoFile = bytes | Path


@dataclass(frozen=True)
class DecodedVideo:
    """The frames taken from a video."""

    patches: np.ndarray  # [t * h * w, 3, 14, 14] uint8 RGB in raster order (t, h, w)
    grid: Grid  # (t, h, w) in patches
    seconds_per_grid: float  # between two time steps: what RoPE's time axis follows
    times_s: list[float]  # [t] true time of each frame behind the first of the video


def probe_video(data: VideoFile) -> MediaInfo:
    """Size, true number of shown frames and their true average rate; decodes up to the first shown frame.

    Raises:
        SampleError: not a video, broken, empty, or above ``MAX_FRAME_PIXELS``, ``MAX_FRAMES`` or
            ``MAX_VIDEO_PIXELS``.
    """
    with open_video(data) as video:
        return video.info


def decode_video(
    data: VideoFile,
    resolution: ResolutionSettings,
    options: MediaOptions | None = None,
    backend: VideoBackend = VideoBackend.pyav,
    out: np.ndarray | None = None,
) -> DecodedVideo:
    """Decode the frames that the budgets allow, each resized once; ``out``: see ``images.place_patches``.

    A frame that the decoder does not deliver (hidden or dropped by the encoder) is replaced by the one before it.

    Raises:
        SampleError: broken, too large, too thin, without frame rate, or of an unknown kind; or ``options`` that do
            not fit it.
        ValueError: ``backend`` is torchcodec, which cannot be loaded here.
    """
    with open_video(data) as video:
        request = MediaRequest.of(video.info, resolution, options)
        indices = frames_taken(video.seconds, request)
        frames = video.pictures(indices, backend)
        return _cut(frames, request, [video.seconds[index] for index in indices], out)


def decode_frames(
    frames: Sequence[Image.Image],
    fps: float,
    resolution: ResolutionSettings,
    options: MediaOptions | None = None,
    out: np.ndarray | None = None,
) -> DecodedVideo:
    """Patches of a video that is given as its frames; all of them are taken, or as many as the budgets allow.

    Args:
        frames: pictures of one size.
        fps: frames per second that they were taken at; the key ``fps`` of ``options`` is not looked at.
        resolution, options: budgets.
        out: see ``images.place_patches``.

    Raises:
        SampleError: no frames, frames of several sizes, or ``options`` that do not fit them.
    """
    request = frames_request(frames, fps, resolution, options)
    indices = request.frame_indices
    return _cut((upright_rgb(frames[i]) for i in indices), request, [index / fps for index in indices], out)


def frames_request(
    frames: Sequence[Image.Image], fps: float, resolution: ResolutionSettings, options: MediaOptions | None = None
) -> MediaRequest:
    """What a list of frames costs; arguments and errors as for ``decode_frames``."""
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1:
        raise SampleError(f"a video of {len(frames)} frames with the sizes {sorted(sizes)}; one size is needed")
    ((width, height),) = sizes
    asked = MediaOptions(**{**(options or {}), "fps": fps})
    if "nframes" in asked:
        del asked["fps"]
    whole = replace(resolution, video_min_frames=1)
    return MediaRequest.of(MediaInfo(MediaKind.video, width, height, len(frames), fps), whole, asked)


def frames_taken(seconds: Sequence[float], request: MediaRequest) -> list[int]:
    """Numbers of the frames that are taken, ascending, in order of presentation.

    Args:
        seconds: [frames] time of every frame of the whole video, ascending.
        request: how many, and from which range.
    """
    times = np.asarray(seconds)
    step = (times[-1] - times[0]) / max(1, len(times) - 1)
    if step <= 0 or np.abs(times - times[0] - step * np.arange(len(times))).max() <= step / 2:
        return request.frame_indices
    first, last = request.first_frame, request.first_frame + request.info.frames - 1
    wanted = times[0] + step * np.linspace(first, last, len(request.frame_indices))
    shown = np.searchsorted(times, wanted + step * 1e-6, side="right") - 1
    return shown.clip(min=0).tolist()


def upright(frame: av.VideoFrame) -> Image.Image:
    """RGB picture of a frame, turned as its display matrix says."""
    image = frame.to_image()
    turns = _quarter_turns(frame)
    return image.rotate(90 * turns, expand=True) if turns else image


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise, 0 to 3: what the display matrix asks for."""
    return round(frame.rotation / 90) % 4


def _cut(
    frames: Iterable[Image.Image], request: MediaRequest, times_s: list[float], out: np.ndarray | None
) -> DecodedVideo:
    grid = t, h, w = request.grid
    patches = place_patches(t * h * w, out)
    for frame, place in zip(frames, patches.reshape(t, h * w, *patches.shape[1:]), strict=True):
        to_patches(resize_to_grid(frame, grid)[None], place)
    return DecodedVideo(patches, grid, request.seconds_per_grid, times_s)


@dataclass
class Video:
    """A demuxed video. Positions count packets in decoding order; frames count the shown ones in order of presentation.

    Packets that the edit list of an MP4 discards are not shown: the decoder needs them and gives no frames for them.
    """

    data: VideoFile
    context: av.VideoCodecContext
    packets: list[av.Packet]
    times: list[int]  # of each position, in ticks
    seconds_per_tick: float
    info: MediaInfo
    turned: bool  # a display matrix turns the frames

    def __post_init__(self) -> None:
        shown = [position for position, packet in enumerate(self.packets) if not packet.is_discard]
        self.order = sorted(shown, key=self.times.__getitem__)
        """[frames] position of each frame."""
        first = self.times[self.order[0]]
        self.seconds = [(self.times[position] - first) * self.seconds_per_tick for position in self.order]
        """[frames] time of each frame behind the first."""

    def pictures(self, indices: Sequence[int], backend: VideoBackend = VideoBackend.pyav) -> Iterator[Image.Image]:
        """Decode the frames ``indices`` (ascending, repeats allowed) to upright RGB pictures.

        Raises:
            SampleError: a frame cannot be decoded.
            ValueError: ``backend`` is torchcodec, which cannot be loaded here.
        """
        if backend == VideoBackend.torchcodec and not self.turned:
            return torchcodec_frames(self.data, indices)
        return (upright(frame) for frame in self._frames([self.order[index] for index in indices]))

    def _frames(self, wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
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
            group = bisect_right(keys, position) - 1
            while group >= 0 and self.times[keys[group]] > self.times[position]:
                group -= 1  # a frame shown before its key frame leans on the group before that one
            needed[(keys[group] if group >= 0 else 0) : position + 1] = 1
        edges = np.flatnonzero(np.diff(needed, prepend=0))
        return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


@contextmanager
def open_video(data: VideoFile) -> Iterator[Video]:
    """Demux a video and decode its first shown frame; FFmpeg's errors within the block become SampleError.

    Raises:
        SampleError: not a video, broken, empty, or above ``MAX_FRAME_PIXELS``, ``MAX_FRAMES`` or
            ``MAX_VIDEO_PIXELS``.
    """
    with ExitStack() as stack:
        try:
            # An open file, never a name: FFmpeg would follow names to other protocols.
            file = io.BytesIO(data) if isinstance(data, bytes) else stack.enter_context(data.open("rb"))
            options = {"format_whitelist": DEMUXERS}
            container = stack.enter_context(av.open(file, mode="r", options=options, metadata_errors="replace"))
            if not container.streams.video:
                raise SampleError("media without a video stream")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise SampleError("video of an unknown codec")
            context.thread_count = 1
            _check_size(context.width, context.height, stream.frames)
            packets = []
            for packet in container.demux(stream):
                if packet.size:
                    packets.append(packet)
                    if len(packets) > MAX_FRAMES:
                        raise SampleError(f"video of more than {MAX_FRAMES} frames")
            _check_size(context.width, context.height, len(packets))
            shown = [packet for packet in packets if not packet.is_discard]
            if not shown:
                raise SampleError("broken video: no frame is shown")
            fps = _frame_rate(stream, shown)
            times, tick = _presentation_times(packets, float(stream.time_base or 0), fps)
            width, height, turned = _upright_size(context, packets)
            info = MediaInfo(MediaKind.video, width, height, len(shown), fps)
            yield Video(data, context, packets, times, tick, info, turned)
        except av.FFmpegError as error:
            raise SampleError(f"broken video: {error.strerror}") from error


def _presentation_times(packets: list[av.Packet], tick: float, fps: float) -> tuple[list[int], float]:
    """Time stamp of each packet and the seconds of its unit.

    Streams without time stamps (raw or AVI) are numbered in decoding order.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) == len(packets):
        return times, tick
    for number, packet in enumerate(packets):
        packet.pts = number
    return list(range(len(packets))), (1 / fps if fps > 0 else 0.0)


def _frame_rate(video: av.VideoStream, packets: list[av.Packet]) -> float:
    """Average frames per second from the time stamps, or the header's where they say nothing."""
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) == len(packets) > 1 and max(times) > min(times) and video.time_base:
        return float((len(times) - 1) / ((max(times) - min(times)) * video.time_base))
    return float(video.average_rate or video.guessed_rate or 0)


def _upright_size(context: av.VideoCodecContext, packets: list[av.Packet]) -> tuple[int, int, bool]:
    """Width and height of the first frame as it is shown, and whether that is turned from how it is stored."""
    for packet in [*packets, None]:
        for frame in context.decode(packet):
            _check_frame(frame)
            context.flush_buffers()
            turns = _quarter_turns(frame)
            width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
            return width, height, turns != 0
    raise SampleError("broken video: no frame can be decoded")


def _check_frame(frame: av.VideoFrame) -> None:
    if frame.is_corrupt:
        raise SampleError("broken video: a frame is corrupt")
    if frame.pts is None:
        raise SampleError("broken video: a frame has no time stamp")
    _check_size(frame.width, frame.height, 1)


def _check_size(width: int, height: int, frames: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise SampleError(f"video of {width} x {height} pixels is above {MAX_FRAME_PIXELS} pixels a frame")
    if width * height * frames > MAX_VIDEO_PIXELS:
        raise SampleError(
            f"video of {frames} frames of {width} x {height} pixels is above {MAX_VIDEO_PIXELS} pixels in all"
        )
