"""Promises: positions equal the published ones; sizes follow from headers alone and never exceed the budget."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye_train.model import positions
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "rope_index.npz")
CASES = list(dict.fromkeys(name.split(".")[0] for name in GOLDEN.files))
PADS = {"image_pad_id": 503, "video_pad_id": 504}


def golden(case: str) -> dict[str, torch.Tensor]:
    return {n.split(".")[1]: torch.from_numpy(GOLDEN[n]).clone() for n in GOLDEN.files if n.startswith(f"{case}.")}


def video(width: int, height: int, frames: int, fps: float) -> MediaInfo:
    return MediaInfo(MediaKind.video, width, height, frames, fps)


@pytest.mark.parametrize("case", CASES)
def test_rope_index_equals_the_published_numbers(case: str) -> None:
    given_ = golden(case)
    seconds = given_["second_per_grid_ts"]
    position_ids, rope_deltas = positions.rope_index(
        given_["input_ids"].long(),
        None if case == "text_no_mask" else given_["attention_mask"],
        given_["image_grid_thw"],
        given_["video_grid_thw"],
        seconds if len(seconds) else None,
        vision_start_id=500,
        **PADS,
    )
    assert torch.equal(position_ids, given_["position_ids"].long())
    assert torch.equal(rope_deltas, given_["rope_deltas"].long())


def test_positions_of_an_interleaved_sample_worked_by_hand() -> None:
    # text, video of 2 frames of 1 x 1 tokens 1.5 s apart, text, image of 1 x 2 tokens, text
    ids = torch.tensor([7, 504, 504, 7, 503, 503, 7])
    found = positions.sample_positions(ids, [(2, 2, 2), (1, 2, 4)], [1.5, 0.0], **PADS)
    assert found.tolist() == [[0, 1, 4, 5, 6, 6, 8], [0, 1, 1, 5, 6, 6, 8], [0, 1, 1, 5, 6, 7, 8]]


@pytest.mark.parametrize("grids", [[], [(1, 2, 2)], [(1, 2, 4), (1, 2, 2)]])
def test_grids_that_do_not_match_the_pad_tokens_are_refused(grids: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="pad tokens"):
        positions.sample_positions(torch.tensor([7, 503, 503, 7]), grids, [0.0] * len(grids), **PADS)


def test_rope_index_refuses_more_vision_blocks_than_grids() -> None:
    ids = torch.tensor([[500, 503, 7, 500, 503]])
    with pytest.raises(ValueError, match="than there are grids"):
        positions.rope_index(ids, None, torch.tensor([[1, 2, 2]]), None, None, vision_start_id=500, **PADS)


@given(
    width=st.integers(1, 20_000), height=st.integers(1, 20_000), low=st.integers(1, 300), room=st.integers(0, 20_000)
)
def test_image_budget_is_a_hard_limit_for_every_size(width: int, height: int, low: int, room: int) -> None:
    resolution = ResolutionSettings(image_min_tokens=low, image_max_tokens=low + room)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(SampleError, match="aspect ratio"):
            positions.image_grid(width, height, resolution)
        return
    t, h, w = grid = positions.image_grid(width, height, resolution)
    assert t == 1
    assert h % 2 == w % 2 == 0
    assert min(h, w) >= 2
    assert positions.grid_tokens(grid) <= resolution.image_max_tokens


@given(
    width=st.integers(28, 4000),
    height=st.integers(28, 4000),
    frames=st.integers(1, 200_000),
    fps=st.floats(0.1, 240),
    frame_low=st.integers(1, 200),
    total=st.integers(200, 30_000),
)
def test_video_budget_counts_every_frame(
    width: int, height: int, frames: int, fps: float, frame_low: int, total: int
) -> None:
    resolution = ResolutionSettings(video_frame_min_tokens=frame_low, video_max_tokens=total)
    info = video(width, height, frames, fps)
    grid = positions.media_grid(info, resolution)
    indices = positions.video_frame_indices(info, resolution)
    assert positions.grid_tokens(grid) <= total
    assert len(indices) == grid[0] <= resolution.video_max_frames
    assert indices == sorted(indices)
    assert 0 <= indices[0] <= indices[-1] <= frames - 1
    seconds = positions.media_seconds_per_grid(info, resolution)
    assert seconds * grid[0] == pytest.approx(frames / fps)


def test_video_sampling_follows_the_rate_of_the_stream() -> None:
    resolution = ResolutionSettings()
    assert positions.video_frame_indices(video(640, 480, 100, 25.0), resolution) == [0, 14, 28, 42, 57, 71, 85, 99]
    assert positions.media_seconds_per_grid(video(640, 480, 100, 25.0), resolution) == 0.5
    # a slow stream is not stretched to 2 frames/s: ten frames, each lasting a second
    assert positions.media_seconds_per_grid(video(640, 480, 10, 1.0), resolution) == 1.0
    # one frame becomes the least number of frames
    assert positions.video_frame_indices(video(640, 480, 1, 30.0), resolution) == [0, 0, 0, 0]


@pytest.mark.parametrize("info", [video(64, 64, 0, 25.0), video(64, 64, 10, 0.0), video(64, 64, 10, float("nan"))])
def test_video_without_frames_or_rate_is_a_sample_error(info: MediaInfo) -> None:
    with pytest.raises(SampleError, match="frames"):
        positions.media_grid(info, ResolutionSettings())


def test_image_seconds_are_zero() -> None:
    assert positions.media_seconds_per_grid(MediaInfo(MediaKind.image, 56, 56), ResolutionSettings()) == 0.0
