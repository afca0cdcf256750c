"""Promises: pixels equal the published ones; every picture mode is handled; broken data is a SampleError."""

import contextlib
import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from toy_inputs import damaged, image_bytes, synthetic_image

from keye_train.model.images import decode_image, probe_image, to_patches
from keye_train.model.positions import grid_tokens, image_grid, media_grid
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "images.json").read_text())
PUBLISHED_LIMITS = ResolutionSettings(image_min_tokens=4, image_max_tokens=1280)
SMALL = ResolutionSettings(image_min_tokens=1, image_max_tokens=9)


def sha256(patches: np.ndarray) -> str:
    return hashlib.sha256(patches.tobytes()).hexdigest()


@pytest.mark.parametrize("row", [r for r in GOLDEN if "image_processor" in r], ids=lambda r: r["name"])
def test_one_resize_gives_the_pixels_of_the_published_image_processor(row: dict[str, Any]) -> None:
    picture = synthetic_image(row["H"], row["W"], row["k"])
    assert hashlib.sha256(picture.tobytes()).hexdigest() == row["sha256_rgb_bytes"]
    patches, grid = decode_image(image_bytes(picture), PUBLISHED_LIMITS)
    assert list(grid) == row["image_processor"]["grid_thw"]
    assert sha256(patches) == row["image_processor"]["sha256_u8"]


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_other_modes_give_the_published_pixels(mode: str) -> None:
    row = next(r for r in GOLDEN if r["name"] == f"mode_{mode}")
    picture = synthetic_image(row["H"], row["W"], row["k"])
    y, x = np.ogrid[: row["H"], : row["W"]]
    alpha = ((9 * y + 4 * x) % 256).astype(np.uint8)
    picture = np.dstack([picture, alpha]) if mode == "RGBA" else picture[..., 0]
    assert sha256(decode_image(image_bytes(picture), PUBLISHED_LIMITS)[0]) == row["sha256_u8"]


def test_patches_are_in_raster_order_channels_first() -> None:
    frames = np.arange(2 * 28 * 42 * 3, dtype=np.uint64).reshape(2, 28, 42, 3)
    patches = to_patches(frames)
    assert patches.shape == (2 * 2 * 3, 3, 14, 14)
    assert patches[7, 2, 5, 6] == frames[1, 5, 14 + 6, 2]  # frame 1, row 0, column 1
    assert patches[9, 0, 0, 0] == frames[1, 14, 0, 0]  # frame 1, row 1, column 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_and_its_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        data = image_bytes(synthetic_image(28, 84), kind, exif=exif)
        info = probe_image(data)
        patches, grid = decode_image(data, SMALL)
        assert (info.width, info.height) == ((84, 28) if orientation < 5 else (28, 84)), kind
        assert grid == media_grid(info, SMALL), kind
        assert len(patches) == grid[1] * grid[2]
    upright, _ = decode_image(image_bytes(Image.fromarray(synthetic_image(28, 84)).rotate(180)), SMALL)
    if orientation == 3:
        turned, _ = decode_image(image_bytes(synthetic_image(28, 84), exif=exif), SMALL)
        assert np.array_equal(turned, upright)


def test_transparency_is_laid_on_white_in_every_mode_that_has_it() -> None:
    grey = Image.new("LA", (28, 28), (40, 0))
    palette = Image.new("P", (28, 28), 3)
    palette.putpalette([10, 20, 30] * 256)
    for data in (image_bytes(grey), image_bytes(palette, transparency=3), image_bytes(palette, "GIF", transparency=3)):
        assert (decode_image(data, SMALL)[0] == 255).all()


def test_palette_cmyk_bilevel_and_16_bit_pictures_keep_their_colours() -> None:
    palette = Image.new("P", (28, 28), 3)
    palette.putpalette([10, 20, 30] * 256)
    assert decode_image(image_bytes(palette), SMALL)[0][0, :, 0, 0].tolist() == [10, 20, 30]
    cmyk = image_bytes(Image.new("CMYK", (28, 28), (255, 0, 0, 0)), "TIFF")
    assert decode_image(cmyk, SMALL)[0][0, :, 0, 0].tolist() == [0, 255, 255]
    deep = image_bytes(Image.fromarray(np.full((28, 28), 0x8123, dtype=np.uint16)))
    assert decode_image(deep, SMALL)[0][0, :, 0, 0].tolist() == [0x81] * 3
    assert decode_image(image_bytes(Image.new("1", (28, 28), 1)), SMALL)[0].min() == 255


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    low=st.integers(1, 8),
    room=st.integers(0, 60),
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
)
def test_tokens_foretold_from_the_header_are_the_tokens_decoded(
    width: int, height: int, low: int, room: int, kind: str
) -> None:
    resolution = ResolutionSettings(image_min_tokens=low, image_max_tokens=low + room)
    data = image_bytes(Image.new("RGB", (width, height)), kind)
    info = probe_image(data)
    assert info == MediaInfo(MediaKind.image, width, height)
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(SampleError):
            decode_image(data, resolution)
        return
    patches, grid = decode_image(data, resolution)
    assert grid == image_grid(width, height, resolution)
    assert len(patches) == 4 * grid_tokens(grid) == 4 * grid_tokens(media_grid(info, resolution))
    assert patches.shape[1:] == (3, 14, 14)
    assert patches.dtype == np.uint8


def huge_png_header() -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9_500, 9_500, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_pixel_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(SampleError, match="above the limit"):
        probe_image(huge_png_header())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_and_garbled_pictures_are_sample_errors(kind: str) -> None:
    whole = image_bytes(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8), kind)
    for data in (whole[: len(whole) // 2], whole[:12], b"", b"no picture at all"):
        with pytest.raises(SampleError, match="broken image"):
            decode_image(data, SMALL)


def test_floating_point_pictures_are_refused() -> None:
    with pytest.raises(SampleError, match="floating-point"):
        decode_image(image_bytes(Image.fromarray(np.zeros((28, 28), dtype=np.float32)), "TIFF"), SMALL)


def test_formats_that_start_other_programs_are_not_opened() -> None:
    with pytest.raises(SampleError, match="broken image"):
        probe_image(image_bytes(Image.new("RGB", (28, 28)), "EPS"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damage_of_any_kind_raises_nothing_but_sample_errors(kind: str) -> None:
    data = image_bytes(synthetic_image(30, 40), kind)
    for seed in range(60):
        with contextlib.suppress(SampleError):
            decode_image(damaged(data, seed), SMALL)
