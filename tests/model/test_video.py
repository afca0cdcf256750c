"""Promises: what the header and packets foretell is what is decoded; the right frames; broken data is a SampleError."""

import contextlib
import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_inputs import damaged, flat_frames, synthetic_image, video_bytes

from keye_train.model.images import resize_to_grid, to_patches
from keye_train.model.media_options import MediaOptions, MediaRequest
from keye_train.model.positions import grid_tokens, media_grid, video_frame_indices
from keye_train.model.video import decode_video, open_video, probe_video
from keye_train.model.video_torchcodec import checked_backend, torchcodec_error
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings, SettingsError, VideoBackend


def resolution(fps: float = 2.0, min_frames: int = 2, max_tokens: int = 600) -> ResolutionSettings:
    return ResolutionSettings(
        video_frame_min_tokens=2,
        video_frame_max_tokens=12,
        video_max_tokens=max_tokens,
        video_fps=fps,
        video_min_frames=min_frames,
    )


def frame_levels(data: bytes, wanted: ResolutionSettings) -> list[int]:
    """Number of the flat frame that each time step shows."""
    video = decode_video(data, wanted)
    patches, grid = video.patches, video.grid
    return [round(float(step.mean()) / 8) for step in np.split(patches, grid[0])]


@settings(max_examples=12, deadline=None)
@given(
    width=st.integers(8, 60).map(lambda n: 2 * n),
    height=st.integers(8, 60).map(lambda n: 2 * n),
    frames=st.integers(1, 30),
    fps=st.integers(1, 60),
    rate=st.floats(0.5, 8),
    codec=st.sampled_from([("mp4", "libx264"), ("mp4", "mpeg4"), ("webm", "libvpx"), ("matroska", "libx264")]),
)
def test_tokens_foretold_are_the_tokens_decoded(
    width: int, height: int, frames: int, fps: int, rate: float, codec: tuple[str, str]
) -> None:
    pictures = [synthetic_image(height, width, i % 11) for i in range(frames)]
    data = video_bytes(pictures, fps, container=codec[0], codec=codec[1])
    info = probe_video(data)
    wanted = resolution(rate)
    assert (info.kind, info.width, info.height, info.frames) == (MediaKind.video, width, height, frames)
    assert info.fps == pytest.approx(fps, rel=0.02)
    video = decode_video(data, wanted)
    patches, grid, seconds = video.patches, video.grid, video.seconds_per_grid
    assert grid == media_grid(info, wanted)
    assert len(patches) == 4 * grid_tokens(grid)
    assert grid_tokens(grid) <= wanted.video_max_tokens
    assert seconds * grid[0] == pytest.approx(info.frames / info.fps)


@pytest.mark.parametrize("key_every", [1, 5, 250])
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_the_frames_named_by_the_sampling_are_the_frames_shown(codec: str, key_every: int) -> None:
    data = video_bytes(flat_frames(31), fps=10, codec=codec, key_every=key_every)
    for rate in (0.5, 1.0, 2.0, 10.0):
        wanted = resolution(rate)
        assert frame_levels(data, wanted) == video_frame_indices(probe_video(data), wanted)


def test_skipping_between_key_frames_changes_no_pixel() -> None:
    rng = np.random.default_rng(0)
    ramps = [synthetic_image(64, 96, i % 7) // 2 + rng.integers(0, 99, dtype=np.uint8) for i in range(60)]
    data = video_bytes(ramps, fps=10, key_every=6)
    wanted = resolution(rate := 0.5)
    video = decode_video(data, wanted)
    patches, grid = video.patches, video.grid
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    indices = video_frame_indices(MediaInfo(MediaKind.video, 96, 64, 60, 10.0), wanted)
    assert len(indices) == rate * 6
    assert np.array_equal(patches, np.concatenate([to_patches(resize_to_grid(every[i], grid)[None]) for i in indices]))


def test_a_very_short_video_repeats_its_frames() -> None:
    assert frame_levels(video_bytes(flat_frames(2)), resolution(min_frames=4)) == [0, 0, 1, 1]


def test_a_stream_without_time_stamps_is_read_in_order() -> None:
    data = video_bytes(flat_frames(20), fps=10, container="avi", codec="mpeg4")
    info = probe_video(data)
    assert (info.frames, info.fps) == (20, pytest.approx(10))
    assert frame_levels(data, resolution()) == video_frame_indices(info, resolution())


def test_a_turned_video_is_put_upright() -> None:
    picture = np.zeros((32, 64, 3), dtype=np.uint8)
    picture[:, :32] = 200  # left half bright
    data = video_bytes([picture] * 4, rotation=90)
    info = probe_video(data)
    assert (info.width, info.height) == (32, 64)
    video = decode_video(data, resolution())
    patches, grid = video.patches, video.grid
    steps = patches.reshape(*grid, -1).mean(axis=(0, 2, 3))  # [h]
    assert grid == media_grid(info, resolution())
    assert steps[-1] > 150 > 50 > steps[0]  # a quarter turn counter-clockwise: left becomes bottom


def test_a_file_cut_off_or_overwritten_is_a_sample_error() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(20)]
    data = video_bytes(noise)
    middle = len(data) // 2
    scratched = data[:middle] + rng.bytes(2000) + data[middle + 2000 :]
    for broken in (data[:middle], data[:50], b"", b"no video at all"):
        with pytest.raises(SampleError, match="broken video"):
            probe_video(broken)
    with pytest.raises(SampleError, match="broken video"):
        decode_video(scratched, resolution(10.0))


def test_media_without_a_picture_track_is_a_sample_error() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        sound = output.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        output.mux(sound.encode(frame))
        output.mux(sound.encode(None))
    with pytest.raises(SampleError, match="without a video stream"):
        probe_video(buffer.getvalue())


def test_a_playlist_cannot_make_the_decoder_open_other_files(tmp_path: Path) -> None:
    target = tmp_path / "secret.mp4"
    target.write_bytes(video_bytes(flat_frames(4)))
    for text in (f"ffconcat version 1.0\nfile {target}\n", f"#EXTM3U\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n"):
        with pytest.raises(SampleError, match="broken video"):
            probe_video(text.encode())


@pytest.mark.parametrize(("container", "codec"), [("mp4", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")])
def test_damage_of_any_kind_raises_nothing_but_sample_errors(container: str, codec: str) -> None:
    data = video_bytes([synthetic_image(48, 64, i) for i in range(8)], container=container, codec=codec)
    for seed in range(40):
        with contextlib.suppress(SampleError):
            decode_video(damaged(data, seed), resolution())


# ------------------------------------------------------------------------------------------- variable frame rate


def timed_video(times_s: list[float], container: str = "mp4") -> bytes:
    """Frame i has the level 8 * i and is shown from times_s[i] on."""
    buffer = io.BytesIO()
    tick = Fraction(1, 1000)
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.time_base = stream.codec_context.time_base = tick
        stream.codec_context.thread_count = 1
        for picture, time_s in zip(flat_frames(len(times_s)), times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(time_s * 1000), tick
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


# 20 frames a second for a second, then one frame a second
UNEVEN = [i / 20 for i in range(20)] + [1.0 + i for i in range(10)]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_is_sampled_evenly_in_time(container: str) -> None:
    data = timed_video(UNEVEN, container)
    video = decode_video(data, wanted := resolution(1.0))
    assert video.grid == media_grid(probe_video(data), wanted)
    times = np.linspace(0, UNEVEN[-1], video.grid[0])
    shown = [max(i for i, time_s in enumerate(UNEVEN) if time_s <= at + 1e-3) for at in times]
    levels = [round(float(step.mean()) / 8) for step in np.split(video.patches, video.grid[0])]
    assert levels == shown
    assert video.times_s == pytest.approx([UNEVEN[i] for i in shown], abs=1e-3)
    # by number, most frames would come from the first second
    assert sum(at < 1 for at in video.times_s) <= 1


@pytest.mark.parametrize("fps", [7, 24, 30, 60])
def test_a_steady_rate_in_coarse_ticks_is_sampled_by_number(fps: int) -> None:
    data = timed_video([i / fps for i in range(31)], "matroska")  # milliseconds: 1 / 30 s is 33 or 34 of them
    assert frame_levels(data, resolution()) == video_frame_indices(probe_video(data), resolution())


@settings(max_examples=10, deadline=None)
@given(
    gaps=st.lists(st.integers(20, 1500), min_size=1, max_size=24),
    rate=st.floats(0.5, 4),
)
def test_time_steps_follow_real_seconds(gaps: list[int], rate: float) -> None:
    """Frames stand in time order, and step k shows what was on screen k steps behind the first, give or take one."""
    starts = np.cumsum([0, *gaps]) / 1000
    data = timed_video(starts.tolist(), "matroska")
    video = decode_video(data, resolution(rate))
    assert video.times_s == sorted(video.times_s)
    for step, time_s in enumerate(video.times_s):
        upto = [*starts[starts > time_s + 1e-3], np.inf][0]
        nominal = step * video.seconds_per_grid
        slack = video.seconds_per_grid + 1e-3
        assert time_s - slack <= nominal <= upto + slack


# ------------------------------------------------------------------------------------------------ options, files


def test_a_time_range_takes_its_frames_only() -> None:
    data = video_bytes(flat_frames(30), fps=10, key_every=5)
    options = MediaOptions(video_start=1.0, video_end=2.0)
    video = decode_video(data, resolution(), options)
    levels = [round(float(step.mean()) / 8) for step in np.split(video.patches, video.grid[0])]
    assert levels == MediaRequest.of(probe_video(data), resolution(), options).frame_indices == [10, 20]
    assert video.times_s == pytest.approx([1.0, 2.0])
    with pytest.raises(SampleError, match="no frames"):
        decode_video(data, resolution(), MediaOptions(video_start=9.0))


def test_a_file_is_read_like_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "http:example.mp4"  # a name that FFmpeg would follow
    path.write_bytes(data := video_bytes(flat_frames(12)))
    assert np.array_equal(decode_video(path, resolution()).patches, decode_video(data, resolution()).patches)


def test_only_groups_with_a_wanted_frame_are_decoded() -> None:
    data = video_bytes(flat_frames(30), key_every=5)
    with open_video(data) as video:
        assert video._runs([0, 29]) == [(0, 1), (25, 30)]
        assert video._runs([6, 8]) == [(5, 9)]


def cut_by_edit_list(data: bytes, skipped: int) -> bytes:
    """Copy an MP4 with its first frames moved before time 0, as cutting without encoding does."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as output:
        stream = source.streams.video[0]
        copied = output.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        shift = skipped * packets[0].duration
        for packet in packets:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copied
            output.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("backend", ["pyav", "torchcodec"])
@pytest.mark.parametrize("key_every", [250, 8])
def test_frames_that_an_edit_list_hides_are_not_counted_or_shown(key_every: int, backend: str) -> None:
    if backend == "torchcodec" and torchcodec_error() is not None:
        pytest.skip(f"torchcodec: {torchcodec_error()}")
    data = cut_by_edit_list(video_bytes(flat_frames(30), fps=10, key_every=key_every), skipped=18)
    info = probe_video(data)
    assert (info.frames, info.fps) == (12, pytest.approx(10))
    for options in (MediaOptions(), MediaOptions(video_start=0.5)):
        video = decode_video(data, resolution(5.0), options, VideoBackend(backend))
        indices = MediaRequest.of(info, resolution(5.0), options).frame_indices
        levels = [round(float(step.mean()) / 8) for step in np.split(video.patches, video.grid[0])]
        assert levels == [18 + index for index in indices]
        assert video.times_s == pytest.approx([index / 10 for index in indices])


# ------------------------------------------------------------------------------------------------ torchcodec


@pytest.mark.skipif(torchcodec_error() is not None, reason=f"torchcodec: {torchcodec_error()}")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_every": 5},
        {"container": "webm", "codec": "libvpx"},
        {"container": "avi", "codec": "mpeg4"},
        {"rotation": 90},
    ],
)
def test_torchcodec_takes_the_same_frames(options: dict[str, Any]) -> None:
    data = video_bytes(flat_frames(31), **options)
    ours = decode_video(data, resolution())
    theirs = decode_video(data, resolution(), backend=VideoBackend.torchcodec)
    assert (theirs.grid, theirs.times_s) == (ours.grid, ours.times_s)
    assert np.abs(theirs.patches.astype(int) - ours.patches).max() <= 3  # frames lie 8 levels apart
    uneven = timed_video(UNEVEN)
    ours, theirs = (
        decode_video(uneven, resolution(1.0), backend=backend) for backend in VideoBackend if backend != "auto"
    )
    assert np.abs(theirs.patches.astype(int) - ours.patches).max() <= 3


@pytest.mark.skipif(torchcodec_error() is not None, reason=f"torchcodec: {torchcodec_error()}")
def test_torchcodec_raises_sample_errors_for_damage() -> None:
    data = video_bytes([synthetic_image(48, 64, i) for i in range(8)])
    for seed in range(40):
        with contextlib.suppress(SampleError):
            decode_video(damaged(data, seed), resolution(), backend=VideoBackend.torchcodec)


def test_a_backend_that_cannot_be_loaded_is_refused_or_replaced() -> None:
    assert checked_backend(VideoBackend.pyav) == VideoBackend.pyav
    if torchcodec_error() is None:
        assert checked_backend(VideoBackend.auto) == checked_backend(VideoBackend.torchcodec) == VideoBackend.torchcodec
        return
    assert checked_backend(VideoBackend.auto) == VideoBackend.pyav
    with pytest.raises(SettingsError, match="video_backend=torchcodec cannot be loaded"):
        checked_backend(VideoBackend.torchcodec)
