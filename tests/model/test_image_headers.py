"""Promise: a size read without Pillow is the size that Pillow finds, or Pillow refuses the file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from keye_train.model.image_headers import plain_size
from keye_train.model.images import open_image, probe_image, upright_size
from keye_train.sample import SampleError


def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (70, 45), **options: object) -> bytes:
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.squeeze(), mode).save(file, kind, **options)
    return file.getvalue()


PLAIN = [
    saved("JPEG"),
    saved("JPEG", "L"),
    saved("JPEG", "CMYK"),
    saved("JPEG", progressive=True, comment=b"some words"),
    saved("JPEG", quality=10, restart_marker_blocks=2, dpi=(300, 300)),
    saved("PNG"),
    saved("PNG", "LA"),
    saved("PNG", "RGBA", dpi=(72, 72)),
]
EXIF = Image.Exif()
EXIF[0x0112] = 6
LEFT_TO_PILLOW = [
    saved("JPEG", exif=EXIF),
    saved("PNG", exif=EXIF),
    saved("JPEG", icc_profile=b"x" * 200),
    saved("WEBP"),
    saved("GIF", "L"),
    b"",
    b"\xff\xd8\xff",
    PLAIN[5][:40],
]


@pytest.mark.parametrize("data", PLAIN)
def test_plain_files_are_read_without_pillow(data: bytes) -> None:
    assert plain_size(data) == upright_size(open_image(data)) == (70, 45)


@pytest.mark.parametrize("data", LEFT_TO_PILLOW)
def test_all_others_are_left_to_pillow(data: bytes) -> None:
    assert plain_size(data) is None
    if data[:40] == data and len(data) > 40:
        assert probe_image(data) is not None


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(PLAIN + LEFT_TO_PILLOW),
    st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), max_size=3),
    st.integers(1, 2000),
)
def test_damaged_files_never_have_two_sizes(data: bytes, changes: list[tuple[int, int]], length: int) -> None:
    damaged = bytearray(data[:length])
    for place, value in changes:
        if place < len(damaged):
            damaged[place] = value
    size = plain_size(bytes(damaged))
    if size is None:
        return
    try:
        image = open_image(bytes(damaged))
    except SampleError:
        return
    assert upright_size(image) == size
