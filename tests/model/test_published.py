"""Promise: the published rules are reproduced exactly, and training departs from them only where it says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from keye_train.model.positions import (
    grid_tokens,
    image_grid,
    media_grid,
    smart_resize,
    video_frame_indices,
    video_seconds_per_grid,
)
from keye_train.model.published import (
    published_processor_resize,
    published_utils_resize,
    published_video_sampling,
)
from keye_train.sample import MediaInfo, MediaKind
from keye_train.settings import ResolutionSettings

GOLDEN = Path(__file__).parents[1] / "golden"
SIZES = json.loads((GOLDEN / "smart_resize.json").read_text())
VIDEOS = [row for row in json.loads((GOLDEN / "video_sampling.json").read_text()) if "name" not in row]


@pytest.mark.parametrize("kind", ["utils", "image_processor"])
def test_sizes_equal_the_published_ones(kind: str) -> None:
    rule = published_utils_resize if kind == "utils" else published_processor_resize
    rows = [row for row in SIZES if row["kind"] == kind]
    assert len(rows) > 100
    for row in rows:
        arguments = (row["h"], row["w"], row["min_pixels"], row["max_pixels"])
        if row["out"] == "ValueError":
            with pytest.raises(ValueError, match="200:1"):
                rule(*arguments)
        else:
            assert list(rule(*arguments)) == row["out"], row


@pytest.mark.parametrize("row", VIDEOS)
def test_video_sampling_equals_the_published_one(row: dict[str, Any]) -> None:
    arguments = (row["total_frames"], row["video_fps"], row["height"], row["width"])
    if "error" in row:
        with pytest.raises(ValueError, match="frames"):
            published_video_sampling(*arguments, **row["ele"])
        return
    found = published_video_sampling(*arguments, **row["ele"])
    assert len(found.indices) == row["nframes"]
    if isinstance(row["indices"], list):
        assert found.indices == row["indices"]
    else:
        assert found.indices[:16] == row["indices"]["first16"]
        assert found.indices[-16:] == row["indices"]["last16"]
        assert sum(found.indices) == row["indices"]["sum"]
    assert found.sample_fps == pytest.approx(row["sample_fps"], rel=1e-6)
    assert [found.height, found.width] == row["resized_hw"]
    served = published_processor_resize(found.height, found.width, 3136, 1_003_520)
    assert [found_side // 14 for found_side in served] == row["video_grid_thw"][1:]


def test_training_sizes_equal_the_published_processor_within_its_limits() -> None:
    compared = 0
    for row in SIZES:
        if row["kind"] != "image_processor" or row["out"] == "ValueError":
            continue
        if row["min_pixels"] % 784 or row["max_pixels"] % 784:
            continue  # not a number of tokens
        low, high = row["min_pixels"] // 784, row["max_pixels"] // 784
        rows, columns = row["out"][0] // 28, row["out"][1] // 28
        if not 0 < rows * columns <= high:
            continue  # the published rule leaves its own budget here
        assert smart_resize(row["w"], row["h"], low, high) == (rows, columns), row
        compared += 1
    assert compared > 80


def test_training_video_budget_holds_where_the_published_one_does_not() -> None:
    row = next(row for row in VIDEOS if row.get("llm_tokens") == 144_000)
    info = MediaInfo(MediaKind.video, row["width"], row["height"], row["total_frames"], row["video_fps"])
    resolution = ResolutionSettings()
    assert grid_tokens(media_grid(info, resolution)) <= resolution.video_max_tokens < row["llm_tokens"]
    assert len(video_frame_indices(info, resolution)) == resolution.video_max_tokens // 128 < row["nframes"]


def test_training_seconds_equal_the_published_ones_for_the_same_frames() -> None:
    for row in VIDEOS:
        if row["ele"] or "error" in row or isinstance(row["indices"], dict):
            continue
        info = MediaInfo(MediaKind.video, row["width"], row["height"], row["total_frames"], row["video_fps"])
        resolution = ResolutionSettings()
        if len(indices := video_frame_indices(info, resolution)) == row["nframes"]:
            assert indices == row["indices"]
            assert video_seconds_per_grid(info, resolution) == pytest.approx(row["second_per_grid_t"], rel=1e-6)


def test_training_resizes_thin_pictures_without_distortion() -> None:
    assert image_grid(2600, 13, ResolutionSettings()) == (1, 2, 400)  # 28 x 5600, as the published processor
