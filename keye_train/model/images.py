"""A picture -> 14 x 14 pixel patches, with exactly one resize.

The size on the grid follows from the header (``positions.image_grid``), so ``probe_image`` and ``decode_image`` agree
by construction. Pixels stay uint8; the model normalises them on its own device.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, UnidentifiedImageError

from keye_train.model.image_headers import plain_size
from keye_train.model.media_options import MediaOptions, MediaRequest
from keye_train.model.positions import PATCH_SIZE, Grid
from keye_train.sample import MediaInfo, MediaKind, SampleError
from keye_train.settings import ResolutionSettings

DRAFT_MARGIN = 2
"""A JPEG decoded at a reduced scale keeps at least this many times the sides of its target."""
MAX_PIXELS = 89_478_485  # a quarter GiB as RGB; Pillow's own threshold for a suspected decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # others can run helper programs (EPS) or are rare
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, KeyError, struct.error, zlib.error)

# EXIF orientation -> the transposition that puts the picture upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def probe_image(data: bytes) -> MediaInfo:
    """Size of a picture after EXIF rotation, from its header alone.

    Raises:
        SampleError: not a picture in one of ``FORMATS``, or more than ``MAX_PIXELS`` pixels.
    """
    return probe_plain(data) or MediaInfo(MediaKind.image, *upright_size(open_image(data)))


def probe_plain(data: bytes) -> MediaInfo | None:
    """The same for a plain JPEG or PNG, without opening it; None for all others.

    Raises:
        SampleError: more than ``MAX_PIXELS`` pixels.
    """
    size = plain_size(data)
    if size is None:
        return None
    _check_pixels(*size)
    return MediaInfo(MediaKind.image, *size)


def decode_image(
    data: bytes,
    resolution: ResolutionSettings,
    options: MediaOptions | None = None,
    scaled_jpeg: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Grid]:
    """Decode a picture into the patches that the vision tower reads; of an animation, the first frame.

    Args:
        data: the file.
        resolution, options: budgets.
        scaled_jpeg: let libjpeg halve, quarter or eighth a JPEG within its inverse DCT as long as ``DRAFT_MARGIN``
            times the target's sides remain. Levels then differ by about 0.5 in the mean and up to 10; which scale
            is taken follows from the sizes alone.
        out: where the patches go, see ``place_patches``.

    Returns:
        patches [h * w, 3, 14, 14] uint8 RGB in raster order, and the grid (1, h, w).

    Raises:
        SampleError: broken, too large, too thin, or of an unknown kind; or ``options`` that cannot hold together.
    """
    return cut_image(open_image(data), resolution, options, scaled_jpeg, out)


def cut_image(
    image: Image.Image,
    resolution: ResolutionSettings,
    options: MediaOptions | None = None,
    scaled_jpeg: bool = False,
    out: np.ndarray | None = None,
) -> tuple[np.ndarray, Grid]:
    """Patches of a picture in any mode; arguments, returned values and errors as for ``decode_image``."""
    grid = MediaRequest.of(MediaInfo(MediaKind.image, *upright_size(image)), resolution, options).grid
    if scaled_jpeg and image.format == "JPEG":
        sides = DRAFT_MARGIN * grid[2] * PATCH_SIZE, DRAFT_MARGIN * grid[1] * PATCH_SIZE
        image.draft(None, sides if _orientation(image) < 5 else sides[::-1])
    return to_patches(resize_to_grid(upright_rgb(image), grid)[None], out), grid


def open_image(data: bytes) -> Image.Image:
    """Open a picture; only its header is read.

    Raises:
        SampleError: not a picture in one of ``FORMATS``, or more than ``MAX_PIXELS`` pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _orientation(image)  # a broken EXIF block shows itself here
    except UnidentifiedImageError as error:
        raise SampleError(f"broken image: none of {', '.join(FORMATS)}") from error
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise SampleError(f"broken image: {error}") from error
    _check_pixels(*image.size)
    return image


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise SampleError(f"image of {width} x {height} pixels is above the limit of {MAX_PIXELS} pixels")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after EXIF rotation; decodes nothing."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def upright_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB (see ``to_rgb``), turned as EXIF says.

    Raises:
        SampleError: broken, or floating-point pixels.
    """
    try:
        orientation = _orientation(image)
        image.load()
    except _BROKEN as error:
        raise SampleError(f"broken image: {error}") from error
    image = to_rgb(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: transparency is laid on white, 16-bit levels are scaled to 8.

    Raises:
        SampleError: floating-point pixels, whose range is not known.
    """
    if image.mode == "F":
        raise SampleError("image with floating-point pixels")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit levels at 255
        levels = np.clip(np.asarray(image), 0, 65535) >> 8
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        return on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def on_white(image: Image.Image) -> Image.Image:
    """An RGBA picture laid on white: RGB."""
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def resize_to_grid(image: Image.Image, grid: Grid) -> np.ndarray:
    """Bicubic (antialiased) resize of an RGB picture to the pixels of one time step.

    Returns:
        [14 * h, 14 * w, 3 or 4] uint8: red, green, blue, and a byte that is not used where Pillow's own memory is
        looked at, which holds 4 bytes a pixel.
    """
    size = (grid[2] * PATCH_SIZE, grid[1] * PATCH_SIZE)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    try:
        levels = pa.array(resized)
    except ValueError:  # above 16 MiB, Pillow holds a picture in several pieces
        return np.asarray(resized)
    return np.frombuffer(levels.values.buffers()[1], dtype=np.uint8).reshape(size[1], size[0], 4)


def to_patches(frames: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Cut frames into patches.

    Args:
        frames: [t, 14 * h, 14 * w, C], of which the first three channels are taken.
        out: where the patches go, see ``place_patches``.

    Returns:
        [t * h * w, 3, 14, 14] in raster order (t, h, w).
    """
    t, height, width, channels = frames.shape
    h, w = height // PATCH_SIZE, width // PATCH_SIZE
    # In two steps, since copies are cheap where they move long runs: first whole lines of patches, then channels.
    line = np.dtype((np.void, PATCH_SIZE * channels * frames.itemsize))
    lines = np.ascontiguousarray(frames).reshape(-1).view(line).reshape(t, h, PATCH_SIZE, w)
    pixels = np.ascontiguousarray(lines.transpose(0, 1, 3, 2)).view(frames.dtype)
    patches = place_patches(t * h * w, out, frames.dtype)
    patches.reshape(-1, 3, PATCH_SIZE**2)[...] = pixels.reshape(-1, PATCH_SIZE**2, channels)[..., :3].swapaxes(1, 2)
    return patches


def place_patches(count: int, out: np.ndarray | None = None, dtype: np.dtype | type = np.uint8) -> np.ndarray:
    """Uninitialised patches [count, 3, 14, 14]: the first rows of ``out``, or new ones where it has too few."""
    if out is not None and len(out) >= count:
        assert out.flags.c_contiguous, "patches are written through reshaped views"
        return out[:count]
    return np.empty((count, 3, PATCH_SIZE, PATCH_SIZE), dtype=dtype)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF pictures itself, and reports the turned size
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # looking for the tag behind the pixels would decode them
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _UPRIGHT else 1
